"""A sample that cannot be trained on, and what failures of one kind have in common."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

_QUOTED = re.compile(r"'([^']*)'")


@dataclass(frozen=True)
class SampleFailure:
    """A sample that cannot be trained on.

    Attributes:
        sample: Its number in the index.
        id: Annotation id.
        path: The image that is bad; None where it is the record.
        stage: `annotation` or `image` (found when the index was made), `read`, `decode` or
            `resize` (found at its step), `budget` (fits no micro-batch).
        reason: One line.
        where: Place of its record, and field of the image, with which the reason starts.
    """

    sample: int
    id: str
    path: str | None
    stage: str
    reason: str
    where: str = ""

    @property
    def kind(self) -> str:
        """What failures of one kind have in common."""
        reason = self.reason.removeprefix(f"{self.where}: ") if self.where else self.reason
        return f"{self.stage} {kind_of(reason, self.id, self.path)}"

    def line(self, step: int) -> dict[str, Any]:
        """What the run's folder keeps of it."""
        return {
            **{"step": step, "sample": self.sample, "id": self.id, "path": self.path},
            **{"stage": self.stage, "reason": self.reason},
        }


def kind_of(reason: str, name: str, path: str | None) -> str:
    """A reason without the names and numbers of its sample, so that those of a kind are equal."""
    own = [part for part in (path, name) if part]
    stems = {_stem(part) for part in own}
    for part in own:
        reason = reason.replace(f"'{part}'", "'...'")
    pieces, last = [], 0
    for quoted in _QUOTED.finditer(reason):
        pieces.append(re.sub(r"\d+", "#", reason[last : quoted.start()]))
        pieces.append("'...'" if _stem(quoted[1]) in stems else quoted[0])
        last = quoted.end()
    return "".join(pieces) + re.sub(r"\d+", "#", reason[last:])


def _stem(name: str) -> str:
    return PurePosixPath(name).name.partition(".")[0]
