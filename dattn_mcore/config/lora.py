"""The adapters that `lora` asks for: patterns resolved to the language model's linears."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

from dattn_mcore.architectures import language_models, vision_towers
from dattn_mcore.architectures.adapters import Adapters, adapted_linears, linears
from dattn_mcore.architectures.parameters import Entry
from dattn_mcore.architectures.patterns import compile_pattern, matched_parts
from dattn_mcore.architectures.sizes import ModelConfig
from dattn_mcore.architectures.tables import model_table
from dattn_mcore.config.schema import Config, LoraConfig
from dattn_mcore.errors import ConfigError


def adapters_of(config: Config) -> Adapters | None:
    """The adapters of a run's model; None: it has none.

    Raises:
        ConfigError: a pattern is malformed, or matches no linear that can have one.
    """
    return _resolve(config.model, config.lora) if config.lora.targets else None


def lora(config: Config) -> Iterator[str]:
    """Rules for adapters, one line per breach."""
    settings, model = config.lora, config.model
    if model.family not in language_models() or model.vision.kind not in vision_towers():
        return  # refused elsewhere
    if not settings.targets:
        if settings.init_from is not None:
            yield (
                f"lora.init_from={settings.init_from} needs lora.targets, the linears that have "
                "adapters there; or set it to null"
            )
        return
    yield from _values(settings)
    if "llm" not in config.train.trains:
        yield (
            f"lora.targets={list(settings.targets)} names linears of the language model, which "
            f"train.trains={list(config.train.trains)} freezes as a whole; add llm to train.trains "
            "(with adapters nothing else of it learns)"
        )
    if config.checkpoint.init_from is None:
        yield (
            "lora.targets needs checkpoint.init_from: adapters learn beside the weights of a "
            "trained model; name its run folder or checkpoint, or set lora.targets=[]"
        )
    if settings.dropout and config.train.recompute_visual_chunk is not None:
        yield (
            f"lora.dropout={settings.dropout} cannot go with train.recompute_visual_chunk="
            f"{config.train.recompute_visual_chunk}, whose backward would draw again; use "
            "lora.dropout=0 or train.recompute=full"
        )
    try:
        adapters = adapters_of(config)
    except ConfigError as error:
        yield from error.mistakes
        return
    assert adapters is not None
    yield from _sizes(config, adapters)


def _values(settings: LoraConfig) -> Iterator[str]:
    if settings.rank < 1:
        yield f"lora.rank={settings.rank} must be at least 1"
    if not (settings.alpha > 0 and math.isfinite(settings.alpha)):
        yield f"lora.alpha={settings.alpha} must be greater than 0"
    if not 0 <= settings.dropout < 1:
        yield f"lora.dropout={settings.dropout} must be at least 0 and less than 1"


def _sizes(config: Config, adapters: Adapters) -> Iterator[str]:
    """What shapes and layout ask for."""
    tp, groups = config.parallel.tp, config.model.llm.num_query_groups
    for linear in adapted_linears(config.model, adapters):
        names = [list(linear.entry.parts)[part] for part in linear.parts]
        for name, (outputs, inputs) in zip(names, linear.shapes(), strict=True):
            if adapters.rank > min(outputs, inputs):
                yield (
                    f"lora.rank={adapters.rank} is larger than {_shown(name)} allows, which is "
                    f"{outputs} x {inputs}; use at most {min(outputs, inputs)}"
                )
        fused = linear.entry.mix.kind == "interleaved"
        if tp > groups and fused and len(linear.parts) < len(linear.entry.parts):
            yield (
                f"lora.targets has {_shown(names[0])} without the other of keys and values, "
                f"which needs parallel.tp={tp} to be at most model.llm.num_query_groups="
                f"{groups}; match both or none, or use a smaller tp"
            )


def _shown(name: str) -> str:
    """A Hugging Face name without what stands around the linear's own."""
    return name.removesuffix(".weight").rpartition(".")[2]


@functools.lru_cache(maxsize=16)
def _resolve(model: ModelConfig, settings: LoraConfig) -> Adapters:
    targets: set[str] = set()
    for pattern in settings.targets:
        matches = compile_pattern(pattern, "lora.targets")
        found = {
            name
            for entry in linears(model)
            for layer in entry.steps()
            for name, meant in zip(
                entry.names(layer), matched_parts(matches, entry, layer), strict=True
            )
            if meant
        }
        if not found:
            raise ConfigError(_no_linear(model, pattern))
        targets |= found
    return Adapters(
        rank=settings.rank,
        alpha=settings.alpha,
        targets=frozenset(targets),
        dropout=settings.dropout,
        dora=settings.dora,
    )


def _no_linear(model: ModelConfig, pattern: str) -> str:
    """What is wrong with a pattern that matches no linear of the language model's layers."""
    matches = compile_pattern(pattern, "lora.targets")
    own: list[Entry] = linears(model)
    known = sorted({_shown(name) for entry in own for name in entry.parts})
    other = next(
        (
            entry.names(layer)[0]
            for entry in model_table(model)
            for layer in entry.steps()
            if any(matched_parts(matches, entry, layer))
        ),
        None,
    )
    what = "no parameter of this model" if other is None else f"{other}, which can have no adapter"
    return (
        f"lora.targets={pattern[:100]!r} matches {what}; adapters stand beside the language "
        f"model's {', '.join(known)}, as in '*.{known[-1]}'"
    )
