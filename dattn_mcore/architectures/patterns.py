"""Patterns over the names of parameters: which of a model's tensors a setting is about.

A tensor has the trainer's own names and those that an export gives it; layers are numbered over the
whole model, whatever the layout. `*` stands for anything, `?` for a character, `{a,b}` for either,
`{13..25}` for a number from 13 to 25. A pattern matches a name as a whole or up to a dot in it, so
that `vision.layers.{13..25}` means everything in these layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dattn_mcore.architectures.parameters import Entry, part_of
from dattn_mcore.errors import ConfigError

Matches = Callable[[str], bool]

_RANGE = re.compile(r"(\d{1,9})\.\.(\d{1,9})")
_DIGITS = re.compile(r"\d+")
_LAYER = re.compile(r"(.*\blayers\.)(\d+)\.(.*)")
_MODEL = "model."  # where most exported names begin; it may be left out
_LONGEST = 1000  # characters


@dataclass(frozen=True)
class _Any:
    """Any characters: at least so many, and no more if `exactly`."""

    exactly: bool


@dataclass(frozen=True)
class _Range:
    """A whole number in decimal digits, both ends included."""

    first: int
    last: int


@dataclass(frozen=True)
class _Either:
    """One of several patterns."""

    choices: tuple[tuple[_Token, ...], ...]


_Token = _Any | _Range | _Either | str


class _Malformed(ValueError):
    """Says what is wrong with a pattern."""


def compile_pattern(pattern: str, setting: str = "pattern") -> Matches:
    """A function that says whether a name is meant by a pattern.

    Args:
        pattern: as described above.
        setting: that holds it, for the message.

    Raises:
        ConfigError: it is malformed.
    """
    try:
        if not pattern or len(pattern) > _LONGEST:
            raise _Malformed("is empty" if not pattern else f"has over {_LONGEST} characters")
        if re.search(r"\s", pattern):
            raise _Malformed("holds white space")
        tokens = _parse(pattern)
    except _Malformed as problem:
        raise ConfigError(
            f"{setting}={pattern[:100]!r} is no pattern: it {problem}; use * for anything, ? for "
            "one character, {a,b} for either, {13..25} for a number in a range"
        ) from None

    def matches(name: str) -> bool:
        ends = _advance(tokens, {0}, name)
        return any(end == len(name) or name[end] == "." for end in ends)

    return matches


def own_names(entry: Entry, layer: int | None) -> tuple[str, ...]:
    """The trainer's names of one layer's tensor: as checkpoints have it, and by part.

    The latter begin with `vision.`, `projector.` or `llm.` and leave `decoder.` out, as in
    `vision.layers.13.mlp.linear_fc1.weight`. None for what only an export has.
    """
    if entry.key is None:
        return ()
    key = entry.key if layer is None else entry.key.replace(".layers.", f".layers.{layer}.", 1)
    part = part_of(key)
    inside = key.removeprefix(f"{part}.").removeprefix("decoder.")
    return tuple(dict.fromkeys((key, f"{part}.{inside}")))


def exported_names(entry: Entry, layer: int | None) -> tuple[tuple[str, ...], ...]:
    """For each Hugging Face tensor of one layer's tensor its names: with and without `model.`."""
    return tuple(
        tuple(dict.fromkeys((name, name.removeprefix(_MODEL)))) for name in entry.names(layer)
    )


def names_of(entry: Entry, layer: int | None) -> tuple[str, ...]:
    """All names of one layer's tensor; of a fused one those of all its Hugging Face tensors."""
    parts = exported_names(entry, layer)
    return own_names(entry, layer) + tuple(name for names in parts for name in names)


def matched_parts(matches: Matches, entry: Entry, layer: int | None) -> tuple[bool, ...]:
    """Which Hugging Face tensors of one layer's tensor a pattern means.

    Args:
        matches: from `compile_pattern`.
        entry: of the model's table.
        layer: of the whole model, from 0; None for an entry without layers.

    Returns:
        One answer for each of `entry.parts`; all are meant where one of the trainer's own names is.
    """
    whole = any(map(matches, own_names(entry, layer)))
    return tuple(whole or any(map(matches, names)) for names in exported_names(entry, layer))


def key_and_layer(name: str, first_layer: int = 0) -> tuple[str, int | None]:
    """The key in the model's table, and the layer's number, of a module's parameter.

    Args:
        name: of Megatron-Core's module, without what wraps it.
        first_layer: number in the whole model of the first of the decoder's layers here; the tower
            stands as a whole on one stage.
    """
    found = _LAYER.fullmatch(name)
    if found is None:
        return name, None
    stack, number, rest = found.groups()
    return stack + rest, int(number) + (first_layer if part_of(name) == "llm" else 0)


def _parse(pattern: str) -> tuple[_Token, ...]:
    tokens: list[_Token] = []
    place = 0
    while place < len(pattern):
        char = pattern[place]
        if char in "*?":
            tokens.append(_Any(exactly=char == "?"))
            place += 1
        elif char == "{":
            end = _closing(pattern, place)
            tokens.append(_Either(tuple(map(_choice, _split(pattern[place + 1 : end])))))
            place = end + 1
        elif char == "}":
            raise _Malformed("has a } without its {")
        else:
            text = re.compile(r"[^*?{}]+").match(pattern, place)
            assert text is not None
            tokens.append(text[0])
            place = text.end()
    return tuple(tokens)


def _closing(pattern: str, start: int) -> int:
    depth = 0
    for place in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[place], 0)
        if depth == 0:
            return place
        if depth > 8:
            raise _Malformed("has braces in braces in braces")
    raise _Malformed("has a { without its }")


def _split(inside: str) -> list[str]:
    """The alternatives between two braces, at commas that stand in no inner braces."""
    choices, depth = [""], 0
    for char in inside:
        depth += {"{": 1, "}": -1}.get(char, 0)
        if char == "," and depth == 0:
            choices.append("")
        else:
            choices[-1] += char
    return choices


def _choice(text: str) -> tuple[_Token, ...]:
    if not text:
        raise _Malformed("has an empty alternative")
    bounds = _RANGE.fullmatch(text)
    if bounds is None:
        if ".." in re.sub(r"\{.*\}", "", text):
            raise _Malformed(f"has {text!r}, which is no range of whole numbers")
        return _parse(text)
    first, last = int(bounds[1]), int(bounds[2])
    if first > last:
        raise _Malformed(f"has the empty range {text}")
    return (_Range(first, last),)


def _advance(tokens: Iterable[_Token], starts: set[int], name: str) -> set[int]:
    """Where in a name the tokens can end that begin at one of the starts."""
    for token in tokens:
        if not starts:
            break
        if isinstance(token, str):
            starts = {at + len(token) for at in starts if name.startswith(token, at)}
        elif isinstance(token, _Either):
            starts = set().union(*(_advance(choice, starts, name) for choice in token.choices))
        elif isinstance(token, _Range):
            numbers = [found for at in starts if (found := _DIGITS.match(name, at))]
            starts = {n.end() for n in numbers if token.first <= int(n[0]) <= token.last}
        elif token.exactly:
            starts = {at + 1 for at in starts if at < len(name)}
        else:
            starts = set(range(min(starts), len(name) + 1))
    return starts
