"""Settings whose value is one of a few words: which ones, and what to say about another.

The words stand in the annotations of the settings (`Literal`); names of architectures come from the
lists of these.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal

from dattn_mcore.architectures import chat_templates, language_models, vision_towers
from dattn_mcore.config.schema import Config

_NAMES: dict[str, Callable[[], typing.Iterable[str]]] = {
    "model.family": language_models,
    "model.vision.kind": vision_towers,
    "data.template": chat_templates,
}
_SHOWN = 100  # characters of what was typed


def unknown_words(config: Config) -> Iterator[str]:
    """One line for each word that its setting does not have."""
    yield from _of_section(config, "")


def words_of(name: str, kind: Any) -> tuple[str, ...]:
    """The words of a setting, or of each entry of a list; none where any value of its type may be.

    Args:
        name: dotted, as in `attention.v2v`.
        kind: its annotation.
    """
    if name in _NAMES:
        return tuple(_NAMES[name]())
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)
    if typing.get_origin(kind) in (tuple, typing.Union, types.UnionType):
        return tuple(word for arg in typing.get_args(kind) for word in words_of(name, arg))
    return ()


def _of_section(section: Any, prefix: str) -> Iterator[str]:
    kinds = _kinds(section.__class__)
    for field in dataclasses.fields(section):
        name, value = f"{prefix}{field.name}", getattr(section, field.name)
        words = words_of(name, kinds[field.name])
        for place, item in _items(name, value):
            if dataclasses.is_dataclass(item):
                yield from _of_section(item, f"{place}.")
            elif words and item is not None and item not in words:
                yield _said(place, item, words)


@functools.cache
def _kinds(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section)


def _items(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A value, or the entries of a list, with their names."""
    if isinstance(value, tuple):
        yield from ((f"{name}[{number}]", item) for number, item in enumerate(value))
    else:
        yield name, value


def _said(name: str, value: Any, words: tuple[str, ...]) -> str:
    typed = str(value)[:_SHOWN]
    near = difflib.get_close_matches(typed.lower(), words, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    return f"{name}={typed!r} is unknown; use one of {', '.join(words)}{meant}"
