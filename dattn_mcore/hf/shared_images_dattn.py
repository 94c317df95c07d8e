"""One copy of the keys and values of images that several samples of a batch show.

Samples that show the same images in the same order read the same visual rows. Beside a
`DattnImageCache` these stay where it holds them, and each sample only knows which list of images it
shows: nothing is copied for a question, for a beam, or for a reordering.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .layout_dattn import Readers


@dataclass(frozen=True)
class ImageRows:
    """What text rows read of one image, or of several one after the other.

    Attributes:
        keys: per layer [rows, kv heads, head_dim], without positions, on the layer's device.
        values: per layer, of the same shape.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def __len__(self) -> int:
        """Visual rows."""
        return len(self.keys[0])

    @property
    def nbytes(self) -> int:
        """Memory of all layers."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


@dataclass(frozen=True)
class ImageList:
    """Images of a sample, in order.

    Attributes:
        rows: their keys and values; None where there is no image.
        lengths: visual rows of each.
    """

    rows: ImageRows | None = None
    lengths: tuple[int, ...] = ()

    def extended(self, images: Sequence[ImageRows]) -> ImageList:
        """This list with more images behind it; one image alone is not copied."""
        if not images:
            return self
        parts = [*([] if self.rows is None else [self.rows]), *images]
        return ImageList(joined(parts), (*self.lengths, *map(len, images)))

    def image_of_row(self) -> Tensor:
        """Index of the image that each visual row belongs to, int64 [rows]."""
        lengths = torch.tensor(self.lengths, dtype=torch.long)
        return torch.arange(len(lengths)).repeat_interleave(lengths)


@dataclass(frozen=True)
class SharedImages:
    """The lists of images that a batch shows.

    Attributes:
        lists: the distinct ones.
        of_sample: int64 [batch], the list that each sample shows; in main memory.
    """

    lists: tuple[ImageList, ...]
    of_sample: Tensor

    @property
    def worthwhile(self) -> bool:
        """Whether a list has two samples or more on average.

        Attention runs list by list. With fewer samples a list, one pass over copies is as fast.
        """
        return 2 * len(self.lists) <= len(self.of_sample)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> SharedImages:
        """The same lists for samples that were reordered, repeated or selected."""
        return replace(self, of_sample=change(self.of_sample))

    def extended(self, images: Sequence[ImageRows], counts: Sequence[int]) -> SharedImages:
        """These lists with further images behind them.

        Args:
            images: new ones, in order of samples; the same image is the same object.
            counts: how many each sample has of them.
        """
        numbers: dict[tuple[int, ...], int] = {}
        lists: list[ImageList] = []
        of_sample, first = [], 0
        for before, count in zip(self.of_sample.tolist(), counts, strict=True):
            new = images[first : first + count]
            first += count
            key = (before, *map(id, new))
            if key not in numbers:
                numbers[key] = len(lists)
                lists.append(self.lists[before].extended(new))
            of_sample.append(numbers[key])
        return SharedImages(tuple(lists), torch.tensor(of_sample))

    def readers(self, images_before: Tensor) -> tuple[Readers, ...]:
        """Which new text rows read each list; lists that none reads are left out.

        Args:
            images_before: int64 [batch, new columns], images of its sample that a column stands
                behind.
        """
        device, columns = images_before.device, images_before.shape[1]
        before = images_before.cpu()
        found = []
        for number, images in enumerate(self.lists):
            samples = (self.of_sample == number).nonzero()[:, 0]
            sample, column = before[samples].nonzero(as_tuple=True)
            if not len(sample):
                continue
            rows = samples[sample] * columns + column
            seen = before.reshape(-1)[rows]
            visible = None
            if int(seen.min()) < len(images.lengths):  # some stand between its images
                visible = (images.image_of_row() < seen[:, None])[None, None].to(device)
            found.append(Readers(number, rows.to(device), visible))
        return tuple(found)

    def copies(self) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """A copy for each sample, padded to the longest list.

        Returns:
            Which rows are real, bool [batch, rows]; the image of its sample that each belongs to,
            int64 of the same shape; and of each layer keys and values [batch, kv heads, rows,
            head_dim].
        """
        sizes = torch.tensor([sum(images.lengths) for images in self.lists])
        most = int(sizes.max())
        image = torch.zeros(len(sizes), most, dtype=torch.long)
        for number, images in enumerate(self.lists):
            image[number, : sizes[number]] = images.image_of_row()
        live = torch.arange(most) < sizes[:, None]
        shown = [images.rows for images in self.lists]
        like = next(rows for rows in shown if rows is not None)
        layers = [
            (
                self._padded([None if r is None else r.keys[n] for r in shown], like.keys[n], most),
                self._padded(
                    [None if r is None else r.values[n] for r in shown], like.values[n], most
                ),
            )
            for n in range(len(like.keys))
        ]
        return live[self.of_sample], image[self.of_sample], layers

    def _padded(self, lists: Sequence[Tensor | None], like: Tensor, most: int) -> Tensor:
        padded = like.new_zeros(len(lists), most, *like.shape[1:])
        for place, rows in zip(padded, lists, strict=True):
            if rows is not None:
                place[: len(rows)] = rows
        return padded[self.of_sample.to(like.device)].transpose(1, 2)


def no_images(batch: int) -> SharedImages:
    """Of samples that have shown nothing yet."""
    return SharedImages((ImageList(),), torch.zeros(batch, dtype=torch.long))


def joined(parts: Sequence[ImageRows]) -> ImageRows:
    """Several images' rows, one after the other."""
    if len(parts) == 1:
        return parts[0]
    layers = range(len(parts[0].keys))
    return ImageRows(
        keys=tuple(torch.cat([part.keys[n] for part in parts]) for n in layers),
        values=tuple(torch.cat([part.values[n] for part in parts]) for n in layers),
    )


__all__ = ["ImageList", "ImageRows", "SharedImages", "joined", "no_images"]
