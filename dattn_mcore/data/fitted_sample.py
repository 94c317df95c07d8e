"""A sample as a step takes it, whole or cut to the budget, from the index alone."""

from __future__ import annotations

from dataclasses import dataclass

from dattn_mcore.data.index.store import Index, IndexedBranch, IndexedImage, IndexedSample
from dattn_mcore.data.templates import merge_runs
from dattn_mcore.types import Layout


@dataclass(frozen=True)
class FittedSample:
    """A sample of a step, cut to the budget: shapes are known, nothing is read yet.

    Attributes:
        indexed: What the index says.
        text_rows: Text rows that take part; fewer than the sample has where it is cut.
        images: Its images that take part.
    """

    indexed: IndexedSample
    text_rows: int
    images: tuple[IndexedImage, ...]

    @property
    def num_tiles(self) -> int:
        """Tiles of the images that take part."""
        return sum(image.num_tiles for image in self.images)

    def layouts(self, rows_per_tile: int) -> tuple[Layout, ...]:
        """Runs in reading order, without reading it: of each branch, or of its only text."""
        before = tuple(image.text_before for image in self.images)
        texts = self.indexed.branches or (IndexedBranch(self.text_rows, before),)
        return tuple(self._layout(text, rows_per_tile) for text in texts)

    def _layout(self, branch: IndexedBranch, rows_per_tile: int) -> Layout:
        runs, text = [], 0
        for image, before in zip(self.images, branch.text_before, strict=True):
            if before > text:
                runs.append((False, before - text))
                text = before
            runs.append((True, image.num_tiles * rows_per_tile))
        if branch.text_rows > text:
            runs.append((False, branch.text_rows - text))
        return merge_runs(runs)


def fitted_sample(index: Index, number: int, text_budget: int | None = None) -> FittedSample:
    """A sample of an index, cut after `text_budget` text rows if that is given.

    Images that stand behind the cut go as well: no row that is left can see them.
    """
    indexed = index.sample(number)
    if text_budget is None or indexed.text_rows <= text_budget:
        return FittedSample(indexed, indexed.text_rows, indexed.images)
    images = tuple(image for image in indexed.images if image.text_before < text_budget)
    return FittedSample(indexed, text_budget, images)
