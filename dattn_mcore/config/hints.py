"""What a mistyped setting or flag was meant to be."""

from __future__ import annotations

import dataclasses
import difflib
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
_MOST = 2  # suggestions


def nearest_setting(name: str) -> str:
    """The setting that a dotted name comes closest to; one of the same last part wins."""
    known = all_keys(Config)
    same = [key for key in known if key.split(".")[-1] == name.split(".")[-1]]
    return difflib.get_close_matches(name, same or known, n=1, cutoff=0.0)[0]


def first_leaf(name: str, value: Any) -> str:
    """The dotted name of the first setting below a section that is not known."""
    while isinstance(value, Mapping) and value:
        key, value = next(iter(value.items()))
        name = f"{name}.{key}"
    return name


def unknown_argument(argument: str) -> str:
    """What to say about a word of the command line that is no `section.key=value`."""
    name, _, value = argument.partition("=")
    known: dict[str, list[str]] = {}
    for key in all_keys(Config):
        known.setdefault(key.split(".")[-1], []).append(key)
    meant = known.get(name) or known.get(next(iter(_close(name, known)), ""), [])
    examples = [f"{key}={value or '...'}" for key in meant[:_MOST]]
    if name in SHORT_FLAGS:
        examples.append(f"--{name} {value or '...'}")
    hint = " or ".join(examples) or "for example optim.lr=1e-4"
    return f"argument {argument!r} is not understood; write section.key=value, {hint}"


def unknown_flag(flag: str) -> str:
    """What to say about a flag that does not exist."""
    name = flag.partition("=")[0].lstrip("-").replace("_", "-").lower()
    names = {key.split(".")[-1].replace("_", "-"): f"{key}=..." for key in all_keys(Config)}
    names |= {short: f"--{short}" for short in SHORT_FLAGS} | _OTHER_NAMES
    near = _close(name, names)
    hint = f"did you mean {names[near[0]]}?" if near else "--help lists the flags."
    return f"flag {flag.partition('=')[0]} is unknown; {hint} Any setting is section.key=value"


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


def _close(name: str, known: typing.Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
