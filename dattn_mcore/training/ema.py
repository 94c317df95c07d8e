"""A running mean of the weights (EMA) in float32, updated after each optimizer step.

    mean = decay x mean + (1 - decay) x weights

Every rank has the mean of its own parameters that learn; frozen ones are their own mean and need no
copy. A step without anything to learn from leaves the weights and the mean alone.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from dattn_mcore.checkpoint.load import holds_ema, load_ema
from dattn_mcore.checkpoint.state import ema_state
from dattn_mcore.config.optim_groups import layers_differ
from dattn_mcore.config.schema import Config
from dattn_mcore.training.hooks import Hook, StepDone
from dattn_mcore.training.optimizer import gathered_weights

logger = logging.getLogger(__name__)
Found = tuple[Path, dict[str, Any]]  # a checkpoint's folder and its manifest


class Ema(Hook):
    """Keeps the mean of this rank's parameters; every rank has one.

    Args:
        config: `train.ema_decay` is set.
        model: this stage's chunks, with the weights that the mean starts from.
    """

    everywhere = True

    def __init__(self, config: Config, model: list[DistributedDataParallel]) -> None:
        assert config.train.ema_decay is not None
        self._decay, self._start = config.train.ema_decay, config.train.ema_start
        self._config, self._model = config, model
        # Megatron-Core saves no stack of layers that lacks some: then frozen ones have a copy too.
        every = layers_differ(config)
        self._parameters = [
            {name: p for name, p in chunk.module.named_parameters() if every or p.requires_grad}
            for chunk in model
        ]
        self.means: list[dict[str, Tensor]] = [
            {name: p.detach().to(torch.float32, copy=True) for name, p in chunk.items()}
            for chunk in self._parameters
        ]

    @torch.no_grad()
    def after_step(self, done: StepDone) -> None:
        """Takes the weights of a step into the mean."""
        if done.result.loss is None:
            return
        # Up to the start the mean is the weights.
        share = 1.0 if done.step <= self._start else 1.0 - self._decay
        # With overlap, other data parallel ranks' updates would come with the next forward.
        with gathered_weights(self._model, self._config):
            for means, parameters in zip(self.means, self._parameters, strict=True):
                for name, mean in means.items():
                    mean.lerp_(parameters[name].detach().float(), share)

    def sharded(self, model: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The mean as sharded tensors beside those of the model, from `state.model_state`."""
        return ema_state(model, self.means)


def start_ema(
    config: Config,
    model: list[DistributedDataParallel],
    pg_collection: ProcessGroupCollection,
    found: Found | None,
) -> Ema | None:
    """The mean of a run whose weights are loaded; None where it asks for none.

    Args:
        config: a checked configuration.
        model: this stage's chunks.
        pg_collection: process groups.
        found: the checkpoint that the run goes on from.

    Raises:
        CheckpointError: its mean does not fit.
    """
    there = found is not None and holds_ema(found[0])
    if config.train.ema_decay is None:
        if found is not None and there:
            logger.info(
                "the running mean of the weights in %s ends here (train.ema_decay is null)",
                found[0].name,
            )
        return None
    ema = Ema(config, model)
    if found is not None and there:
        load_ema(found[0], [chunk.module for chunk in model], ema.means, pg_collection)
    elif found is not None:
        logger.info(
            "%s has no running mean of the weights (train.ema_decay): it starts from the weights "
            "of step %d",
            found[0].name,
            found[1]["step"],
        )
    return ema
