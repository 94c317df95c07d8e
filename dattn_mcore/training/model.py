"""A run's model: the records that it is built from, out of the configuration."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from dattn_mcore.config.schema import Config
from dattn_mcore.layers.runtime import Runtime
from dattn_mcore.models.build import build_model
from dattn_mcore.models.dattn import DattnModel, freeze_all_but
from dattn_mcore.training.runtime import decide_runtime


def build_from_config(
    config: Config,
    pg_collection: ProcessGroupCollection,
    device: torch.device,
    initialize: bool = True,
    runtime: Runtime | None = None,
) -> list[DattnModel]:
    """Builds the model chunks of this pipeline stage (one, or vpp of them).

    Args:
        config: the run's configuration.
        pg_collection: process groups of its layout.
        device: where parameters end up.
        initialize: fill fresh weights; without it they hold garbage until a checkpoint is loaded.
        runtime: what was decided at the start of the run; None: it is decided here.

    Returns:
        The chunks in the order of the interleaved schedule, frozen parts marked.
    """
    chunks = build_model(
        config.model,
        config.attention,
        decide_runtime(config) if runtime is None else runtime,
        pg_collection,
        device=device,
        seed=config.train.seed if initialize else None,
    )
    for chunk in chunks:
        freeze_all_but(chunk, config.train.trains)
    return chunks
