"""From a configuration to this rank's model chunks."""

from __future__ import annotations

import torch
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection

from dattn_mcore.config.schema import Config
from dattn_mcore.models.dattn import DattnModel, freeze_all_but
from dattn_mcore.models.initialize import initialize_weights
from dattn_mcore.models.transformer_configs import llm_transformer_config


def build_model(
    config: Config,
    pg_collection: ProcessGroupCollection,
    device: torch.device,
    initialize: bool = True,
) -> list[DattnModel]:
    """Builds the model chunks of this pipeline stage (one, or vpp of them).

    Args:
        config: the run's configuration.
        pg_collection: process groups.
        device: where parameters end up.
        initialize: fill fresh weights; without it they hold garbage until a checkpoint is loaded.

    Returns:
        The chunks in the order of the interleaved schedule, frozen parts marked.
    """
    transformer_config = llm_transformer_config(config)
    vp_size = transformer_config.virtual_pipeline_model_parallel_size
    chunks = []
    for index in range(config.parallel.vpp):
        vp_stage = index if vp_size else None
        chunks.append(
            DattnModel(
                config,
                transformer_config,
                pg_collection,
                pre_process=is_pp_first_stage(pg_collection.pp)
                and is_vp_first_stage(vp_stage, vp_size),
                post_process=is_pp_last_stage(pg_collection.pp)
                and is_vp_last_stage(vp_stage, vp_size),
                vp_stage=vp_stage,
            )
        )
    if initialize:
        initialize_weights(chunks, config.model, config.train.seed)
    for chunk in chunks:
        freeze_all_but(chunk, config.train.trains)
        chunk.to(device)
    return chunks
