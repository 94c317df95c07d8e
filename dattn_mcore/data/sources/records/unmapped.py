"""What a mapped record holds below its keys that no path of `mapping:` reads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from dattn_mcore.data.sources.metadata import is_filled, unused
from dattn_mcore.errors import DataError

Steps = Sequence[str | int | None]  # keys, entries, and None for every entry of a list
Tree = dict[str | int | None, Any]  # by a step: what is read below it
_WHOLE = ""  # key of a tree whose value is read as a whole; no step is empty


def tree_of(paths: Iterable[Steps]) -> Tree:
    """The parts of a record that some paths read."""
    tree: Tree = {}
    for path in paths:
        node = tree
        for step in path:
            node = node.setdefault(step, {})
        node[_WHOLE] = True
    return tree


def left_over(record: Any, tree: Tree, known: Collection[str]) -> list[str]:
    """Names of what lies below a record's keys, is not read, and may be left aside.

    The record's own keys are not looked at: `metadata.left_aside` does that, as for any form. Of a
    list of which a path names an entry (`[2]`), the others are left aside: the user chose.

    Args:
        record: The record.
        tree: What is read of it.
        known: Names of metadata.

    Raises:
        DataError: Names a key that is neither read nor known metadata.
    """
    names: dict[str, None] = {}  # each once, in order
    for key, value in record.items():
        if key in tree:
            _walk(value, [tree[key]], key, known, names)
    return list(names)


def _walk(
    value: Any, trees: list[Tree], where: str, known: Collection[str], names: dict[str, None]
) -> None:
    if not is_filled(value) or any(_WHOLE in tree for tree in trees):
        return
    if isinstance(value, dict):
        for key, one in value.items():
            below, full = _below(trees, key), f"{where}.{key}"
            if below:
                _walk(one, below, full, known, names)
            elif is_filled(one):
                if key.casefold() not in known:
                    raise DataError(unused(f"key '{full}'", key))
                names[full] = None
    elif isinstance(value, list):
        for number, one in enumerate(value):
            below = _below(trees, None) + _below(trees, number)
            if below:
                mark = "[]" if _below(trees, None) else f"[{number}]"
                _walk(one, below, where + mark, known, names)
            elif is_filled(one):
                names[f"other entries of {where}"] = None


def _below(trees: list[Tree], step: str | int | None) -> list[Tree]:
    return [tree[step] for tree in trees if step in tree]
