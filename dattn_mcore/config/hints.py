"""What a mistyped setting or flag was meant to be."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping
from typing import Any

from dattn_mcore.config.schema import Config

SHORT_FLAGS = {
    "tp": "parallel.tp",
    "pp": "parallel.pp",
    "cp": "parallel.cp",
    "device": "train.device",
}
# How others call a flag; settings are found by their own names.
_OTHER_NAMES = {
    "tensor-parallel-size": "--tp",
    "pipeline-parallel-size": "--pp",
    "context-parallel-size": "--cp",
    "dry-run": "--dry-run",
    "config-file": "--config",
}
# What others have a setting for and this project has not: words of such a setting, and what to say.
_ABSENT: dict[frozenset[str], str] = {
    frozenset({"val", "valid", "validate", "eval", "evaluation", "evaluate"}): (
        "the held-out loss has settings in validation (validation.share, validation.interval)"
    ),
    frozenset({"comet", "neptune", "swanlab", "clearml", "aim"}): (
        "metrics go to metrics.jsonl, TensorBoard, Weights & Biases and MLflow (log.tensorboard, "
        "log.wandb, log.mlflow), nowhere else"
    ),
}
_MOST = 2  # suggestions
_SHOWN = 100  # characters of what was typed


def unknown_key(name: str) -> str:
    """What to say about a setting that does not exist.

    A suggestion is close in the same section, has the same last part in another, or is close as a
    whole. Where there is none, the section's settings are named instead of a misleading one.
    """
    said = f"unknown configuration key {name[:_SHOWN]!r}"
    known = all_keys(Config)
    section, _, last = re.sub(r"\[\d+\]", "[0]", name).rpartition(".")
    of_section = [key for key in known if key.rpartition(".")[0] == section]
    words = sorted(last.split("_"))  # grad_clip is clip_grad
    same = [key for key in known if sorted(key.rpartition(".")[2].split("_")) == words]
    if same:
        return f"{said}; did you mean {_close(name, same, 0.0)[0]!r}?"
    if absent := _absent(name):
        return f"{said}; {absent}"
    ours = {key.rpartition(".")[2]: key for key in of_section}
    near = [ours[key] for key in _close(last, ours)] or _close(name, known, 0.8)
    if near:
        return f"{said}; did you mean {near[0]!r}?"
    if section and of_section:
        return f"{said}; {section} has {', '.join(ours)}"
    return f"{said}; the sections are {', '.join(typing.get_type_hints(Config))}"


def _absent(name: str) -> str | None:
    """What to say of a setting that others have, by the words in its name."""
    words = set(re.split(r"[._-]", name.lower()))
    return next((said for named, said in _ABSENT.items() if words & named), None)


def first_leaf(name: str, value: Any) -> str:
    """The dotted name of the first setting below a section that is not known."""
    while isinstance(value, Mapping) and value:
        key, value = next(iter(value.items()))
        name = f"{name}.{key}"
    return name


def unknown_argument(argument: str) -> str:
    """What to say about a word of the command line that is no `section.key=value`."""
    name, _, value = argument.partition("=")
    said = f"argument {argument[:_SHOWN]!r} is not understood"
    if (absent := _absent(name)) is not None:
        return f"{said}; {absent}"
    name, value = name[:_SHOWN], value[:_SHOWN]
    known: dict[str, list[str]] = {}
    for key in _of_command_line():
        known.setdefault(key.split(".")[-1], []).append(key)
    meant = known.get(name) or known.get(next(iter(_close(name, known)), ""), [])
    examples = [f"{key}={value or '...'}" for key in meant[:_MOST]]
    if name in SHORT_FLAGS:
        examples.append(f"--{name} {value or '...'}")
    hint = " or ".join(examples) or "for example optim.lr=1e-4"
    return f"{said}; write section.key=value, {hint}"


def unknown_flag(flag: str) -> str:
    """What to say about a flag that does not exist."""
    name = flag.partition("=")[0].lstrip("-").replace("_", "-").lower()
    names = {key.split(".")[-1].replace("_", "-"): f"{key}=..." for key in _of_command_line()}
    names |= {short: f"--{short}" for short in SHORT_FLAGS} | _OTHER_NAMES
    near = _close(name, names)
    if absent := _absent(name):
        return f"flag {flag.partition('=')[0][:_SHOWN]} is unknown; {absent}"
    hint = f"did you mean {names[near[0]]}?" if near else "--help lists the flags."
    shown = flag.partition("=")[0][:_SHOWN]
    return f"flag {shown} is unknown; {hint} Any setting is section.key=value"


def _of_command_line() -> list[str]:
    """Settings that can be set one by one: without those of a list's entries."""
    return [key for key in all_keys(Config) if "[" not in key]


def all_keys(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of all sections and settings."""
    keys = []
    for key, kind in typing.get_type_hints(cls).items():
        keys.append(f"{prefix}{key}")
        if dataclasses.is_dataclass(kind):
            keys += all_keys(typing.cast(type, kind), f"{prefix}{key}.")
        elif is_list_of_sections(kind):
            keys += all_keys(typing.get_args(kind)[0], f"{prefix}{key}[0].")
    return keys


def is_list_of_sections(kind: Any) -> bool:
    """Whether a field holds any number of sections (data.sources)."""
    return typing.get_origin(kind) is tuple and dataclasses.is_dataclass(typing.get_args(kind)[0])


def _close(name: str, known: typing.Iterable[str], cutoff: float = 0.6) -> list[str]:
    return difflib.get_close_matches(name[:_SHOWN], list(known), n=1, cutoff=cutoff)
