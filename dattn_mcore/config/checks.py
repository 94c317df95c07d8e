"""Checks of a whole configuration, each rule a small function that gives one line per breach.

Here stand the rules for single values and the number of processes; those across settings stand in
`model_rules` and `training_rules`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from dattn_mcore.config import model_rules, training_rules
from dattn_mcore.config.schema import Config
from dattn_mcore.errors import ConfigError

CHOICES: dict[str, tuple[str, ...]] = {
    "model.family": ("mistral", "gemma2"),
    "model.vision.kind": ("siglip", "clip"),
    "model.llm.activation": ("silu", "gelu_tanh"),
    "model.vision.activation": ("gelu_tanh", "gelu", "quick_gelu"),
    "attention.v2v": ("diagonal", "causal"),
    "attention.t2v_position": ("none", "rope"),
    "attention.merge": ("alpha", "sum"),
    "attention.backend": ("auto", "reference", "sdpa", "flash", "triton"),
    "data.template": ("plain", "mistral", "gemma"),
    "data.prepare": ("none", "digits"),
    "data.over_budget": ("skip", "truncate", "error"),
    "data.image_backend": ("auto", "dali", "pillow"),
    "data.image_policy": ("stretch", "pad", "crop", "anyres_stretch", "anyres_letterbox"),
    "data.anyres_ties": ("aspect", "first"),
    "data.transparency": ("white", "drop"),
    "train.stage": ("align", "pretrain", "instruct"),
    "model.transformer_impl": ("auto", "local", "transformer_engine"),
    "train.precision": ("fp32", "bf16"),
    "train.fp8": ("none", "delayed", "tensorwise", "blockwise"),
    "train.recompute": ("none", "selective", "full"),
    "train.device": ("auto", "cpu", "gpu"),
}


def check_config(config: Config) -> None:
    """Checks everything that does not depend on the number of processes.

    Raises:
        ConfigError: the first rule that is broken.
    """
    for rule in (
        *(_choices, _positive, model_rules.sources, model_rules.heads, model_rules.layers),
        *(model_rules.vocabulary, model_rules.vision, training_rules.visual_chunk),
        *(training_rules.training, training_rules.overlap, training_rules.recompute),
        *(training_rules.fp8, training_rules.unbuilt),
    ):
        for message in rule(config):
            raise ConfigError(message)


def data_parallel_size(config: Config, world_size: int) -> int:
    """Data parallel replicas of a world; the rest of the processes share one model.

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
            f"run torchrun --nproc-per-node {one_model} pretrain_dattn.py ..."
        )
    return world_size // one_model


def processes_per_replica(config: Config) -> int:
    """Processes that hold one copy of the model."""
    return config.parallel.tp * config.parallel.pp * config.parallel.cp


def row_multiple(config: Config) -> int:
    """What visual and text rows of a micro-batch are padded to a multiple of.

    Every sequence parallel shard holds as many rows as the others, and in FP8 a multiple of 16;
    Transformer Engine gathers what is quantised by blocks in whole blocks only.
    """
    shards = config.parallel.tp if config.parallel.sp else 1
    per_shard = training_rules.FP8_ROWS if config.train.fp8 != "none" else 1
    if config.train.fp8 == "blockwise" and shards > 1:
        per_shard = training_rules.FP8_BLOCK
    return math.lcm(config.data.pad_multiple, shards * per_shard)


def value_of(config: Config, name: str) -> Any:
    """The value of a dotted field name."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _choices(config: Config) -> Iterator[str]:
    for name, allowed in CHOICES.items():
        if value_of(config, name) not in allowed:
            yield f"{name}={value_of(config, name)!r} is unknown; use one of {', '.join(allowed)}"


def _positive(config: Config) -> Iterator[str]:
    for name in (
        *("parallel.tp", "parallel.pp", "parallel.vpp", "parallel.cp", "parallel.timeout_minutes"),
        *("model.llm.num_layers", "model.llm.hidden_size", "model.vision.num_layers"),
        *("data.text_budget", "data.visual_budget", "data.pad_multiple", "data.decode_threads"),
        *("data.prefetch", "train.global_batch_size", "train.epochs", "optim.lr"),
        *("train.loss_chunk",),
        *("checkpoint.save_interval", "checkpoint.keep", "log.interval"),
        "health.start_timeout_seconds",
    ):
        if value_of(config, name) <= 0:
            yield f"{name}={value_of(config, name)} must be greater than 0"
    if config.train.steps is not None and config.train.steps <= 0:
        yield f"train.steps={config.train.steps} must be greater than 0, or null for train.epochs"
    multiple = config.data.step_packs_multiple
    if multiple is not None and multiple <= 0:
        yield f"data.step_packs_multiple={multiple} must be greater than 0, or null"
    for limit in ("step", "checkpoint"):
        name = f"health.{limit}_timeout_seconds"
        if value_of(config, name) < 0:
            yield f"{name}={value_of(config, name)} must be at least 0 (0: no limit)"
    for name in ("optim.warmup_ratio", "optim.min_lr_ratio"):
        if not 0 <= value_of(config, name) <= 1:
            yield f"{name}={value_of(config, name)} must lie between 0 and 1"
