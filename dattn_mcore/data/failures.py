"""Samples that cannot be trained on: what is known of one, its mask, and how many there may be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from dattn_mcore.data.batch import MicroBatch
from dattn_mcore.data.image_files import check_folder
from dattn_mcore.data.index.store import Index
from dattn_mcore.data.sample_failure import SampleFailure
from dattn_mcore.errors import DataError
from dattn_mcore.types import IGNORED_LABEL

_NAMED = 3  # in an error's one line
_MOST_KINDS = 1000


@dataclass
class Kinds:
    """Failures counted by kind, with the first of each.

    Attributes:
        counts: Of each kind.
        first: The first failure of each kind.
    """

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, SampleFailure] = field(default_factory=dict)

    def add(self, failure: SampleFailure) -> bool:
        """Counts one; what comes behind a thousand kinds is one kind, so that memory is bounded.

        Returns:
            Whether it is the first of its kind.
        """
        kind = failure.kind
        if kind not in self.first and len(self.first) >= _MOST_KINDS:
            kind = "other"
        self.first.setdefault(kind, failure)
        self.counts[kind] += 1
        return self.counts[kind] == 1

    def most(self, number: int) -> list[tuple[int, SampleFailure]]:
        """The most frequent kinds: how often, and the first failure."""
        return [(count, self.first[kind]) for kind, count in self.counts.most_common(number)]


def unusable(index: Index) -> Iterable[SampleFailure]:
    """What the index found to be unusable."""
    for entry in index.bad():
        yield SampleFailure(
            sample=entry["sample"],
            id=entry["id"],
            path=entry["path"],
            stage=entry["stage"],
            reason=f"{entry['where']}: {entry['reason']}",
            where=entry["where"],
        )


def check_share(index: Index, max_share: float) -> None:
    """Refuses a data set of which too much is unusable.

    Raises:
        DataError: Names a folder of images that is not there, or the kinds with a sample of each.
    """
    bad = len(index) - index.num_usable
    if bad == 0 or (bad <= max_share * len(index) and index.num_usable):
        return
    for source in index.settings.sources:
        if source.format == "json":
            for folder in source.folders():
                check_folder(folder)
    kinds = Kinds()
    places: dict[int, str] = {}
    for failure, entry in zip(unusable(index), index.bad(), strict=True):
        if kinds.add(failure):
            places[failure.sample] = f"{entry['where']} sample {entry['id']!r}: {entry['reason']}"
    most = kinds.most(_NAMED)
    named = [
        (f"{count} like " if count > 1 else "") + places[failure.sample] for count, failure in most
    ]
    left = bad - sum(count for count, _ in most)
    where = f"{index.folder / 'bad.jsonl'}"
    if bad <= max_share * len(index):
        raise nothing_to_train(bad, len(index), named, left, where)
    raise too_many(bad, len(index), max_share, named, left, where)


def too_many(
    bad: int, total: int, max_share: float, named: list[str], left: int, where: str
) -> DataError:
    """The error that ends a run.

    Args:
        bad: Samples that are unusable.
        total: Samples there are.
        max_share: `data.max_bad_share`.
        named: What is said of some of them.
        left: How many of them nothing is said of.
        where: The file that lists all of them.
    """
    more = f"; and {left} more" if left else ""
    return DataError(
        f"{bad} of {total} samples are unusable, data.max_bad_share={max_share:g} allows "
        f"{int(max_share * total)}: {'; '.join(named)}{more}; all are in '{where}'; fix them, or "
        "raise data.max_bad_share"
    )


def nothing_to_train(bad: int, total: int, named: list[str], left: int, where: str) -> DataError:
    """The error that ends a run whose samples are all of no use; for the arguments see above."""
    more = f"; and {left} more" if left else ""
    return DataError(
        f"nothing can be trained: {bad} of {total} samples are unusable and no other fits a "
        f"micro-batch: {'; '.join(named)}{more}; all are in '{where}'; fix them"
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
            labels[row : row + rows] = IGNORED_LABEL
        row += rows
    return replace(micro_batch, labels=labels)
