"""Samples that cannot be trained on: what is known of one, its mask, and how many there may be."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from dattn_mcore.data.batch import MicroBatch
from dattn_mcore.data.image_files import check_folder
from dattn_mcore.data.index.store import Index
from dattn_mcore.data.templates import NO_LOSS
from dattn_mcore.errors import DataError

_NAMED = 3  # in an error's one line


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
    """

    sample: int
    id: str
    path: str | None
    stage: str
    reason: str

    def line(self, step: int) -> dict[str, Any]:
        """What the run's folder keeps of it."""
        return {
            **{"step": step, "sample": self.sample, "id": self.id, "path": self.path},
            **{"stage": self.stage, "reason": self.reason},
        }


def unusable(index: Index) -> Iterable[SampleFailure]:
    """What the index found to be unusable."""
    for entry in index.bad():
        yield SampleFailure(
            sample=entry["sample"],
            id=entry["id"],
            path=entry["path"],
            stage=entry["stage"],
            reason=entry["reason"] if entry["path"] else f"{entry['where']}: {entry['reason']}",
        )


def check_share(index: Index, max_share: float) -> None:
    """Refuses a data set of which too much is unusable.

    Raises:
        DataError: Names a folder of images that is not there, or the first samples.
    """
    bad = len(index) - index.num_usable
    if bad == 0 or (bad <= max_share * len(index) and index.num_usable):
        return
    for source in index.settings.sources:
        if source.format == "json":
            check_folder(source.image_folder)
    named: list[str] = []
    for entry in index.bad():
        if len(named) == _NAMED:
            break
        who = f" sample {entry['id']!r}" if entry["id"] else ""
        named.append(f"{entry['where']}{who}: {entry['reason']}")
    where = f"{index.folder / 'bad.jsonl'}"
    if bad <= max_share * len(index):
        raise nothing_to_train(bad, len(index), named, where)
    raise too_many(bad, len(index), max_share, named, where)


def too_many(bad: int, total: int, max_share: float, named: list[str], where: str) -> DataError:
    """The error that ends a run: how many, which, where all of them stand, and the way out."""
    more = f"; and {bad - len(named)} more" if bad > len(named) else ""
    return DataError(
        f"{bad} of {total} samples are unusable, data.max_bad_share={max_share:g} allows "
        f"{int(max_share * total)}: {'; '.join(named)}{more}; all are in '{where}'; mend them, or "
        "raise data.max_bad_share"
    )


def nothing_to_train(bad: int, total: int, named: list[str], where: str) -> DataError:
    """The error that ends a run whose samples are all of no use, however many may be."""
    more = f"; and {bad - len(named)} more" if bad > len(named) else ""
    return DataError(
        f"nothing can be trained: {bad} of {total} samples are unusable and no other fits a "
        f"micro-batch: {'; '.join(named)}{more}; all are in '{where}'; mend them"
    )


def mask(micro_batch: MicroBatch, failed: Collection[int]) -> MicroBatch:
    """Takes the loss from samples that failed on any rank; shapes stay.

    Args:
        micro_batch: One pack.
        failed: Numbers of failed samples.
    """
    if not any(number in failed for number in micro_batch.samples):
        return micro_batch
    labels, row = micro_batch.labels.clone(), 0
    for number, layout in zip(micro_batch.samples, micro_batch.layouts, strict=True):
        rows = sum(count for is_visual, count in layout if not is_visual)
        if number in failed:
            labels[row : row + rows] = NO_LOSS
        row += rows
    return replace(micro_batch, labels=labels)
