"""From plain values, as YAML has them, to the types of the settings."""

from __future__ import annotations

import dataclasses
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any

from dattn_mcore.config.hints import first_leaf, is_list_of_sections, unknown_key
from dattn_mcore.errors import ConfigError

_LARGEST = 2**63  # of a whole number: what a file format or a library holds
_SHORT = reprlib.Repr()  # a value in a message may be as large as its YAML text makes it
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 8, 8, 8
_SHORT.maxstring = _SHORT.maxother = 100


def build(cls: type, tree: Any, prefix: str) -> Any:
    """A section of settings from plain values; those that are left out have their defaults.

    Args:
        cls: dataclass of the section.
        tree: names to values; of inner sections as well.
        prefix: dotted name of the section with a dot at its end, or empty.

    Raises:
        ConfigError: all unknown keys (with the nearest known ones) and values of a wrong type.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{prefix[:-1]}={shown(tree)} must be a section with keys of its own")
    types_of = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    mistakes: list[str] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in types_of:
            mistakes.append(unknown_key(first_leaf(name, value)))
            continue
        kind = types_of[key]
        try:
            if dataclasses.is_dataclass(kind):
                values[key] = build(typing.cast(type, kind), value, f"{name}.")
            else:
                values[key] = _convert(kind, value, name)
        except ConfigError as error:
            mistakes += error.mistakes
    if mistakes:
        raise ConfigError(*mistakes)
    return cls(**values)


def _convert(kind: Any, value: Any, name: str) -> Any:
    """Checks a plain value against a field's type; integers pass for floats, lists for tuples."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (kind,) = [arg for arg in args if arg is not type(None)]
        return _convert(kind, value, name)
    if origin is tuple:
        items = list(value) if isinstance(value, list | tuple) else [value]
        fixed = Ellipsis not in args
        if fixed and len(items) != len(args):
            raise ConfigError(
                f"{name}={shown(value)} must have {len(args)} values, it has {len(items)}"
            )
        if is_list_of_sections(kind):
            section = typing.cast(type, args[0])
            return tuple(build(section, item, f"{name}[{n}].") for n, item in enumerate(items))
        kinds = args if fixed else (args[0],) * len(items)
        return tuple(_convert(k, item, name) for k, item in zip(kinds, items, strict=True))
    if origin is typing.Literal:
        kind = str
    if kind is float and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-3 as text
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    # A bool is an int to Python, but never to a user.
    elif isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        if kind is int and abs(value) >= _LARGEST:
            raise ConfigError(f"{name} is a number of more than 18 digits; write a smaller one")
        return value
    raise ConfigError(f"{name}={shown(value)} must be of type {kind.__name__}")


def shown(value: Any) -> str:
    """A value as a message shows it."""
    try:
        text = _SHORT.repr(value)
        return text if len(text) <= 2 * _SHORT.maxstring else f"{text[: 2 * _SHORT.maxstring]}..."
    except ValueError:  # Python writes no number of thousands of digits
        return "a number of thousands of digits"
