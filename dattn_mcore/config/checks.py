"""Checks of a whole configuration, each rule a small function that gives one line per breach.

The rules stand in `words` and `value_rules` (single values), `model_rules`, `training_rules`,
`context_rules`, `optim_groups`, `schedule`, `lora`, `validation_rules`, `checkpoint_rules` and
`export_rules`; what depends on the number of processes stands here.
"""

from __future__ import annotations

import math

from dattn_mcore.config import (
    checkpoint_rules,
    context_rules,
    export_rules,
    lora,
    model_rules,
    optim_groups,
    profile_rules,
    schedule,
    scores_rules,
    training_rules,
    validation_rules,
    value_rules,
)
from dattn_mcore.config.schema import Config
from dattn_mcore.config.words import unknown_words
from dattn_mcore.errors import ConfigError
from dattn_mcore.types import Shards

_OF_VALUES = (unknown_words, value_rules.readable, value_rules.ranges)
_ACROSS = (
    model_rules.sources,
    model_rules.heads,
    model_rules.windows,
    model_rules.rope,
    model_rules.layers,
    model_rules.parallel_sizes,
    model_rules.vision,
    context_rules.local_rows,
    context_rules.tiles,
    export_rules.export,
    training_rules.visual_chunk,
    optim_groups.mistakes,
    schedule.mistakes,
    schedule.lengths,
    training_rules.overlap,
    training_rules.recompute,
    training_rules.fp8,
    validation_rules.held_out,
    checkpoint_rules.kept,
    checkpoint_rules.mean_of_weights,
    profile_rules.window,
    profile_rules.what_is_recorded,
    scores_rules.scores,
    lora.lora,
)


def check_config(config: Config) -> None:
    """Checks everything that does not depend on the number of processes.

    Raises:
        ConfigError: with every rule that is broken.
    """
    mistakes = [message for rule in _OF_VALUES for message in rule(config)]
    unusable = bool(mistakes)
    for rule in _ACROSS:
        try:
            mistakes += rule(config)
        except (ArithmeticError, ValueError):
            if not unusable:
                raise
            # It divides by a size that is refused above.
    if mistakes:
        raise ConfigError(*dict.fromkeys(mistakes))


def data_parallel_size(config: Config, world_size: int, command: str = "pretrain_dattn.py") -> int:
    """Data parallel replicas of a world; the rest of the processes share one model.

    Args:
        config: Of the run.
        world_size: Processes.
        command: What torchrun starts, for the message.

    Raises:
        ConfigError: the world is no multiple of tp x pp x cp.
    """
    parallel = config.parallel
    one_model = processes_per_replica(config)
    if world_size % one_model:
        product = f"tp ({parallel.tp}) x pp ({parallel.pp})"
        if parallel.cp > 1:
            product += f" x cp ({parallel.cp})"
        raise ConfigError(
            f"{product} needs a multiple of {one_model} processes, got {world_size}; "
            f"run torchrun --nproc-per-node {one_model} {command} ..."
        )
    return world_size // one_model


def check_rehearsed(config: Config, world_size: int, rank: int | None) -> None:
    """Checks the size and the rank of a rehearsed job.

    Args:
        config: of the job.
        world_size: its processes.
        rank: one of them, or None.

    Raises:
        ConfigError: the layout does not divide the world, or the rank is not in it.
    """
    replica = processes_per_replica(config)
    if world_size < 1 or world_size % replica:
        raise ConfigError(
            f"--rehearse {world_size}: the processes of the job must be a multiple of {replica}, "
            f"which one model takes ({sizes_of_replica(config)}); choose another number, --tp or "
            "--pp"
        )
    if rank is not None and not 0 <= rank < world_size:
        raise ConfigError(
            f"--rehearse-rank {rank} is no rank of {world_size} processes; choose one from 0 to "
            f"{world_size - 1}"
        )


def processes_per_replica(config: Config) -> int:
    """Processes that hold one copy of the model."""
    return config.parallel.tp * config.parallel.pp * config.parallel.cp


def sizes_of_replica(config: Config) -> str:
    """Tp 2 x pp 4, and cp where it is used: what a message says of `processes_per_replica`."""
    parallel = config.parallel
    context = f" x cp {parallel.cp}" if parallel.cp > 1 else ""
    return f"tp {parallel.tp} x pp {parallel.pp}{context}"


def shards_of(config: Config) -> Shards:
    """How many ranks divide the rows of a micro-batch."""
    parallel = config.parallel
    return Shards(context=parallel.cp, tensor=parallel.tp if parallel.sp else 1)


def row_multiple(config: Config) -> int:
    """What visual and text rows of a micro-batch are padded to a multiple of.

    Every context parallel rank and sequence parallel shard holds as many rows as the others, and
    in FP8 a multiple of 16; Transformer Engine gathers what is quantised by blocks in whole blocks
    only.
    """
    shards = shards_of(config)
    ranks = shards.ranks
    if config.parallel.tower == "tiles":  # all ranks receive as many rows, with sp or without
        ranks = shards.context * config.parallel.tp
    per_shard = training_rules.FP8_ROWS if config.train.fp8 != "none" else 1
    if config.train.fp8 == "blockwise" and shards.tensor > 1:
        per_shard = training_rules.FP8_BLOCK
    return math.lcm(config.data.pad_multiple, ranks * per_shard)
