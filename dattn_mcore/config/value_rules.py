"""Rules for single values: numbers that are finite and in range; one line per breach."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from dattn_mcore.config.schema import Config

# Greater than 0, by section; of those that may be null, the second text says what null means.
_POSITIVE = {
    "model.llm": (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "head_dim",
        "vocab_size",
        "vocab_pad_multiple",
        "norm_eps",
        "rotary_base",
        "init_std",
    ),
    "model.llm.rope": (
        "factor",
        "original_length",
        "low_frequency_factor",
        "high_frequency_factor",
        "beta_slow",
        "beta_fast",
        "attention_factor",
    ),
    "model.vision": (
        "image_size",
        "patch_size",
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "norm_eps",
        "init_std",
    ),
    "model.projector": ("ffn_hidden_size", "norm_eps"),
    "parallel": ("tp", "pp", "vpp", "cp", "timeout_minutes"),
    "data": (
        "text_budget",
        "visual_budget",
        "pad_multiple",
        "max_image_pixels",
        "decode_threads",
        "prefetch",
    ),
    "optim": ("lr", "eps"),
    "train": ("global_batch_size", "epochs", "loss_chunk"),
    "scores": ("batch_size",),
    "checkpoint": ("save_interval", "keep"),
    "health": ("start_timeout_seconds",),
    "log": ("interval",),
    "profile": ("steps",),
}
_POSITIVE_OR_NULL = {
    "model.llm.attention_softcap": "null for none",
    "model.llm.final_softcap": "null for none",
    "model.llm.query_scale": "null for model.llm.head_dim",
    "model.llm.sliding_window": "null for none",
    "model.llm.sliding_rotary_base": "null for model.llm.rotary_base",
    "checkpoint.keep_every": "null for none",
    "data.step_packs_multiple": "null",
    "optim.lr_projector": "null for optim.lr",
    "optim.lr_vision": "null for optim.lr",
    "optim.min_lr": "null for optim.min_lr_ratio",
    "train.steps": "null for train.epochs",
    "profile.start": "null for no profile",
    "validation.interval": "null for the end of the run alone",
    "validation.samples": "null for all",
    "scores.interval": "null for the end of the run alone",
    "scores.samples": "null for all",
    "scores.max_new_tokens": "null for each benchmark's own",
}
_AT_LEAST_ZERO = {
    "model.llm.rope.query_scale_beta": "0: none",
    "checkpoint.keep_best": "0: none",
    "scores.examples": "0: none",
    "health.step_timeout_seconds": "0: no limit",
    "health.checkpoint_timeout_seconds": "0: no limit",
    "optim.weight_decay": "0: none",
    "optim.clip_grad": "0: no limit",
    "optim.warmup_steps": "0: none",
    "optim.decay_steps": "null: the run's steps, of wsd none",
    "train.ema_start": "0: from the first step",
}
_SHARES = (
    "optim.warmup_ratio",
    "optim.min_lr_ratio",
    "data.max_bad_share",
    "data.max_skipped_share",
)
_BELOW_ONE = ("optim.beta1", "optim.beta2")
SEEDS = 2**32  # as many as every library takes


def value_of(config: Config, name: str) -> Any:
    """The value of a dotted field name."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def readable(config: Config) -> Iterator[str]:
    """No number is nan or infinite, and no text holds what no file's name can."""
    for name, value in _leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{name}={value} must be a finite number"
        if isinstance(value, str) and "\0" in value:
            yield f"{name}={value!r} holds a NUL character; leave it out"


def ranges(config: Config) -> Iterator[str]:
    """Numbers that have a least or a largest value; nan breaks `readable` alone."""
    for section, keys in _POSITIVE.items():
        for key in keys:
            if (value := value_of(config, f"{section}.{key}")) <= 0:
                yield f"{section}.{key}={value} must be greater than 0"
    for name, or_else in _POSITIVE_OR_NULL.items():
        value = value_of(config, name)
        if value is not None and value <= 0:
            yield f"{name}={value} must be greater than 0, or {or_else}"
    for name, meaning in _AT_LEAST_ZERO.items():
        if (value := value_of(config, name)) is not None and value < 0:
            yield f"{name}={value} must be at least 0 ({meaning})"
    for name in _SHARES:
        if (value := value_of(config, name)) is not None and (value < 0 or value > 1):
            yield f"{name}={value} must lie between 0 and 1"
    for name in _BELOW_ONE:
        if (value := value_of(config, name)) < 0 or value >= 1:
            yield f"{name}={value} must be at least 0 and less than 1"
    if not 0 <= config.train.seed < SEEDS:
        yield f"train.seed={config.train.seed} must be at least 0 and less than {SEEDS}"
    if min(config.data.image_std) <= 0:
        yield f"data.image_std={list(config.data.image_std)} must be greater than 0 in each channel"


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value of a configuration with its dotted name."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name), f"{name}.{field.name}".lstrip("."))
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{name}[{number}]")
    else:
        yield name, value
