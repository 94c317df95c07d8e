"""A child that imports modules one after the other: `python -m dattn_mcore.doctor.imports NAME...`.

For each it tells None, or the first line of what its import raised.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from dattn_mcore.doctor.children import Child, teller
from dattn_mcore.errors import first_line

_MODULE = "dattn_mcore.doctor.imports"


class Imports:
    """Modules that are imported elsewhere, while this process does something else."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._waiting = list(modules)
        self._child = self._start()

    def _start(self) -> Child | None:
        return Child(_MODULE, self._waiting) if self._waiting else None

    def problems(self) -> dict[str, str | None]:
        """Why each module cannot be imported; None where it can.

        A module that ends its process gets that as its reason, and the others are tried again.
        """
        found: dict[str, str | None] = {}
        while self._child is not None:
            told = self._child.told()
            found |= told.steps
            self._waiting = [name for name in self._waiting if name not in found]
            if told.died_in is not None and self._waiting:
                # What never began died with what stands first.
                name = told.died_in if told.died_in in self._waiting else self._waiting[0]
                found[name] = f"its import {told.how}"
                self._waiting.remove(name)
            self._child = self._start()
        return found


def main(modules: Sequence[str]) -> int:
    """Imports and tells."""
    tell = teller()
    for name in modules:
        tell({"name": name})
        problem = None
        try:
            importlib.import_module(name)
        except BaseException as error:  # noqa: BLE001 (a broken package raises anything, SystemExit too)
            problem = f"{type(error).__name__}: {first_line(error)}"
        tell({"name": name, "gave": problem})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
