"""Paths of `mapping:`: keys with dots between, `[]` behind a list, `[2]` for one entry of it."""

from __future__ import annotations

import re
from typing import Any

from dattn_mcore.data.sources.record import kind
from dattn_mcore.errors import DataError

Steps = list[str | int | None]  # keys, entries, and None for every entry of a list
_STEP = re.compile(r"([^.\[\]]+)((?:\[\d*\])*)(?:\.|$)")
_INDEX = re.compile(r"\[(\d*)\]")


def field_of(record: Any, path: str) -> Any:
    """What stands at a path; None where a key of it is absent. A path with [] gives a list.

    Raises:
        DataError: The path asks for a list, or an entry of one, where there is none.
    """
    return walk(record, steps_of(path), path)


def walk(value: Any, steps: Steps, path: str) -> Any:
    """What stands at some steps below a value.

    Args:
        value: A record, or a part of one.
        steps: From it.
        path: How messages call them.

    Raises:
        DataError: A step asks for a list, or an entry of one, where there is none.
    """
    for number, step in enumerate(steps):
        if value is None:
            return None
        if isinstance(step, str):
            if not isinstance(value, dict):
                raise DataError(f"'{path}': '{step}' is looked for in {kind(value)}, no object")
            value = value.get(step)
        elif not isinstance(value, list):
            raise DataError(f"'{path}': a list is due, got {kind(value)}")
        elif step is None:
            found = [walk(one, steps[number + 1 :], path) for one in value]
            nested = None in steps[number + 1 :]
            return [one for part in found for one in part or []] if nested else found
        elif step >= len(value):
            raise DataError(f"'{path}': the list has {len(value)} entries and no [{step}]")
        else:
            value = value[step]
    return value


def steps_of(path: str) -> Steps:
    """Keys, entries, and None for every entry of a list; empty where a path is malformed."""
    steps: Steps = []
    place = 0
    while place < len(path):
        match = _STEP.match(path, place)
        if match is None or (match[0].endswith(".") and match.end() == len(path)):
            return []
        steps.append(match[1])
        steps += [int(index) if index else None for index in _INDEX.findall(match[2])]
        place = match.end()
    return steps
