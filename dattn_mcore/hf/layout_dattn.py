"""Where text and visual rows stand, and what each may see.

`input_ids` holds one placeholder per image. Its column is a *dead* text row: it is no key, it
counts for no position, and nobody reads its output. The image's visual rows live beside the text
columns, so cache lengths and attention masks line up with `input_ids`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# text_live, image_starts [batch, columns]; visual_live, visual_image [batch, visual rows]
Rows = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Readers:
    """New text rows that read one list of images, of which a batch has one copy.

    Attributes:
        number: of the list.
        rows: int64 [rows], sample * new columns + column.
        visible: bool [1, 1, rows, visual rows of the list]; None: each row sees all of them.
    """

    number: int
    rows: Tensor
    visible: Tensor | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Readers:
        """A copy on another device."""
        visible = self.visible
        if visible is not None:
            visible = visible.to(device, non_blocking=non_blocking)
        return Readers(self.number, self.rows.to(device, non_blocking=non_blocking), visible)


@dataclass
class Layout:
    """Positions and visibility of one forward pass; `new` rows are queries, all rows are keys.

    Attributes:
        text_position: int64 [batch, columns], rotary position of every text column.
        visual_position: int64 [batch, visual rows], rotary position of every visual row.
        new_text: number of new text columns, the last ones.
        new_visual: number of new visual rows, the last ones.
        t2t, t2v, v2v, v2t: bool [batch, 1, new rows, all rows], True where a key is visible.
            v2v and v2t are None where visual rows attend to themselves only (or to no text).
        images_before: int64 [batch, new text columns], images of its sample that a column stands
            behind.
        readers: who reads the images of which the batch has one copy; they are no visual rows here.
    """

    text_position: Tensor
    visual_position: Tensor
    new_text: int
    new_visual: int
    t2t: Tensor
    t2v: Tensor
    v2v: Tensor | None
    v2t: Tensor | None
    images_before: Tensor
    readers: tuple[Readers, ...] = ()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Layout:
        """A copy on another device: how accelerate hands it to a layer that lies there."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        readers = tuple(reader.to(device, non_blocking) for reader in self.readers)
        return replace(self, **moved, readers=readers)

    def of_last(self, columns: int) -> Layout:
        """Returns this layout with the last new text columns as the only text queries."""
        first = self.new_text - columns
        return replace(
            self,
            new_text=columns,
            t2t=self.t2t[:, :, first:],
            t2v=self.t2v[:, :, first:],
            images_before=self.images_before[:, first:],
        )

    def windowed(self, window: int, shared_axis: bool) -> Layout:
        """Returns this layout with keys hidden that are `window` or more positions back.

        A window is a statement about positions, so it holds for pairs that are rotated on one
        axis: text with text and visual with visual always, text with visual if `shared_axis`.
        """
        text, visual = (
            self.text_position[:, None, None, :],
            self.visual_position[:, None, None, :],
        )
        new_text = self.text_position[:, None, -self.new_text :, None]
        new_visual = self.visual_position[:, None, visual.shape[-1] - self.new_visual :, None]
        return replace(
            self,
            t2t=self.t2t & (new_text - text < window),
            t2v=self.t2v & (new_text - visual < window) if shared_axis else self.t2v,
            v2v=None if self.v2v is None else self.v2v & (new_visual - visual < window),
            v2t=None if self.v2t is None else self.v2t & (new_visual - text < window),
        )


def build_layout(
    rows: Rows,
    new_text: int,
    new_visual: int,
    causal_v2v: bool,
    shared_axis: bool,
) -> Layout:
    """Derives positions and visibility from what stands in each column.

    Args:
        rows: text_live bool [batch, columns], real text rows; image_starts bool [batch, columns],
            image placeholders; visual_live bool [batch, visual rows], in order of images;
            visual_image int64 [batch, visual rows], index of the image within its sample.
        new_text: how many of the last columns are queries.
        new_visual: how many of the last visual rows are queries.
        causal_v2v: whether visual rows attend to each other causally.
        shared_axis: whether visual and text rows share one axis of positions (reading order).
    """
    text_live, image_starts, visual_live, visual_image = rows
    batch, columns = text_live.shape
    device = text_live.device
    text_index = text_live.long().cumsum(1) - text_live.long()  # text rows before a column
    images_before = image_starts.long().cumsum(1) - image_starts.long()
    visual_index = visual_live.long().cumsum(1) - visual_live.long()
    num_images = int(image_starts.sum(1).max()) if columns else 0
    text_position, visual_position = text_index, visual_index
    if shared_axis and num_images:
        # Visual rows before image i, and text rows before image i, per sample.
        slots = torch.where(visual_live, visual_image, num_images)
        height = torch.zeros(batch, num_images + 1, dtype=torch.long, device=device)
        height.scatter_add_(1, slots, torch.ones_like(slots))
        rows_before = height.cumsum(1) - height
        start = torch.zeros(batch, num_images + 1, dtype=torch.long, device=device)
        start.scatter_(1, torch.where(image_starts, images_before, num_images), text_index)
        text_position = text_index + rows_before.gather(1, images_before)
        visual_position = visual_index + start.gather(1, slots)

    column = torch.arange(columns, device=device)
    query = column[columns - new_text :, None]
    itself = column == query  # dead rows see themselves, so that no softmax is over nothing
    t2t = (text_live[:, None, :] & (column <= query)) | itself
    t2v = visual_live[:, None, :] & (
        visual_image[:, None, :] < images_before[:, columns - new_text :, None]
    )
    v2v = v2t = None
    if causal_v2v:
        visual_rows = visual_live.shape[1]
        row = torch.arange(visual_rows, device=device)
        new_row = row[visual_rows - new_visual :, None]
        earlier = visual_index[:, None, :] <= visual_index[:, visual_rows - new_visual :, None]
        v2v = ((visual_live[:, None, :] & earlier) | (row == new_row))[:, None]
        if shared_axis:
            reader = visual_position[:, visual_rows - new_visual :, None]
            v2t = (text_live[:, None, :] & (text_position[:, None, :] < reader))[:, None]
    return Layout(
        text_position,
        visual_position,
        new_text,
        new_visual,
        t2t=t2t[:, None],
        t2v=t2v[:, None],
        v2v=v2v,
        v2t=v2t,
        images_before=images_before[:, columns - new_text :],
    )


__all__ = ["Layout", "Readers", "Rows", "build_layout"]
