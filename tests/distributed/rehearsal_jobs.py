"""What the pool's workers run: a training step whose collectives are recorded."""

from __future__ import annotations

from typing import Any

import torch

from dattn_mcore.parallel.collectives import Collective, Tracer, group_names
from dattn_mcore.training.inputs import all_model_inputs, with_own_tiles
from dattn_mcore.training.model import build_from_config
from dattn_mcore.training.optimizer import build_optimizer, wrap_ddp
from dattn_mcore.training.rehearse import pack_of
from dattn_mcore.training.schedule import build_scheduler
from dattn_mcore.training.step import train_step
from tests.distributed.jobs import start


def traced_step(tree: dict[str, Any], packs: list[Any]) -> list[Collective]:
    """What this rank exchanges in a training step of packs with these layouts."""
    config, groups = start(tree)
    device = torch.device("cpu")
    model = wrap_ddp(build_from_config(config, groups, device), config, groups)
    optimizer = build_optimizer(config, model)
    scheduler = build_scheduler(config, optimizer, 2)
    with Tracer(group_names(groups)) as tracer:
        own = [with_own_tiles(pack_of(config, layouts), groups) for layouts in packs]
        inputs = all_model_inputs(own, config, groups, device)
        train_step(model, optimizer, scheduler, inputs, groups)
    return tracer.collectives
