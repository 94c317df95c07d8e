"""From the records of a model to this rank's model chunks."""

from __future__ import annotations

import torch
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection

from dattn_mcore.architectures.adapters import Adapters
from dattn_mcore.architectures.sizes import AttentionConfig, ModelConfig
from dattn_mcore.layers.runtime import Runtime
from dattn_mcore.models.dattn import DattnModel
from dattn_mcore.models.initialize import initialize_weights
from dattn_mcore.models.transformer_configs import llm_transformer_config


def build_model(
    model: ModelConfig,
    attention: AttentionConfig,
    runtime: Runtime,
    pg_collection: ProcessGroupCollection,
    *,
    device: torch.device,
    seed: int | None,
    adapters: Adapters | None = None,
) -> list[DattnModel]:
    """Builds the model chunks of this pipeline stage (one, or `runtime.chunks_per_stage`).

    Args:
        model: what it is: family and sizes.
        attention: how its attention is decomposed.
        runtime: how it is computed.
        pg_collection: process groups; `tp`, `pp` and `cp` are used.
        device: where parameters end up.
        seed: of initial weights, which are the same in every layout; None: the parameters hold
            garbage until a checkpoint is loaded.
        adapters: of the language model's linears; None: there are none.

    Returns:
        The chunks in the order of the interleaved schedule; all parameters learn.
    """
    pp_group = pg_collection.pp
    transformer_config = llm_transformer_config(
        model,
        runtime,
        tp_size=pg_collection.tp.size(),
        pp_size=pp_group.size(),
        cp_size=pg_collection.cp.size(),
    )
    vp_size = transformer_config.virtual_pipeline_model_parallel_size
    chunks = []
    for index in range(runtime.chunks_per_stage):
        vp_stage = index if vp_size else None
        chunks.append(
            DattnModel(
                model,
                attention,
                runtime,
                transformer_config,
                pg_collection,
                pre_process=is_pp_first_stage(pp_group) and is_vp_first_stage(vp_stage, vp_size),
                post_process=is_pp_last_stage(pp_group) and is_vp_last_stage(vp_stage, vp_size),
                vp_stage=vp_stage,
                adapters=adapters,
            )
        )
    if seed is not None:
        initialize_weights(chunks, model, seed, adapters)
    for chunk in chunks:
        chunk.to(device)
    return chunks
