"""Which row of a packed `[visual; text]` sequence is what, and which rows see each other.

A sample in reading order is a sequence of runs, each of visual or of text rows. A pack of samples
is stored with all visual rows first (in the order of samples, then of images), then all text
rows. Samples that show the same images can share their visual rows, which then stand once, where
the first of them has them. Everything the attention needs follows from the runs; it is worked out
here once per micro-batch, on the host, and travels through Megatron-Core in `packed_seq_params`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from dattn_mcore.layers.blocks import Block, ContextRows, check_blocks
from dattn_mcore.types import NO_IMAGES, Layout, T2VPosition, visual_units


class VisualKeysValues(Protocol):
    """Keys and values of visual rows that went through the layers before the text rows."""

    def keys_values(self, layer_number: int) -> torch.Tensor:
        """[V, 1, groups / tp * 2 * head_dim] of a layer, rows in the order of the whole pack."""
        ...


@dataclass
class VisualChunk(PackedSeqParams):
    """Some visual rows of a pack, alone on their way through the layers (V2V diagonal).

    Attributes:
        keys_values: filled by the layers in turn, as `VisualKeysValues` has them, rows of this
            chunk in the order of the sequence parallel shards.
    """

    keys_values: list[torch.Tensor] = field(default_factory=list)


@dataclass
class DecomposedSeqParams(PackedSeqParams):
    """One packed micro-batch, as the attention sees it.

    All ranks of a replica hold the same, and where its rows are divided by context parallelism all
    those of one rank there (`layers.context.share_of`). Row indices are those of the whole pack, or
    of that rank's rows (before sequence parallel sharding). Padding rows
    stand at the end of the visual and of the text rows; they belong to no sample, see nothing
    and are seen by nobody.

    Attributes:
        num_visual: visual rows V, padding included.
        num_text: text rows T, padding included.
        text_lengths: rows per sample, without padding.
        visual_lengths: rows per sample likewise, or per unit where samples share images.
        blocks: what each run of text rows sees of the visual rows, and the only statement of it: a
            row sees the visual rows of all blocks that hold it. Runs that see none are absent.
            See `check_blocks`.
        reading_order: int64 [real rows]; row indices into `[visual; text]` (text rows offset by
            num_visual), sample after sample in reading order. Empty where samples share images: a
            shared row has no place among the rows of one sample.
        text_positions, visual_positions: int64 [T], [V]; RoPE positions in the mode for which
            this was built, zero on padding.
        cache: what a backend derives once per pack.
        visual: set where the hidden state holds text rows only.
        context: what these rows need of the rows that other context parallel ranks hold; None: the
            pack is whole.
    """

    num_visual: int = 0
    num_text: int = 0
    text_lengths: tuple[int, ...] = ()
    visual_lengths: tuple[int, ...] = ()
    blocks: tuple[Block, ...] = ()
    reading_order: torch.Tensor = field(default=None)  # type: ignore[assignment]
    text_positions: torch.Tensor = field(default=None)  # type: ignore[assignment]
    visual_positions: torch.Tensor = field(default=None)  # type: ignore[assignment]
    cache: dict = field(default_factory=dict)
    visual: VisualKeysValues | None = None
    context: ContextRows | None = None


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not less than value."""
    return -(-value // multiple) * multiple


def padded_rows(
    layouts: Sequence[Layout], multiple: int, images_of: Sequence[int] = ()
) -> tuple[int, int]:
    """Visual and text rows of a pack, each padded up to a multiple.

    A pack always has at least one padded group of text rows, so that no rank ever sends an
    empty tensor; a pack of text-only samples has no visual rows at all.

    Args:
        layouts: runs of each sample, in reading order.
        multiple: rows are padded up to this.
        images_of: see `types.visual_units`.
    """
    visual = sum(visual_units(layouts, images_of))
    text = sum(rows for layout in layouts for is_visual, rows in layout if not is_visual)
    return round_up(visual, multiple), max(round_up(text, multiple), multiple)


def interleave_shards(visual: torch.Tensor, text: torch.Tensor, shards: int) -> torch.Tensor:
    """From `[V]`, `[T]` of the whole pack to `[V_0; T_0; V_1; T_1; ...]`, the shards' order.

    Args:
        visual: [V, 1, width]; V is a multiple of shards, and may be 0.
        text: [T, 1, width], likewise.
        shards: ranks that share the rows (sequence parallelism).
    """
    if shards == 1 or visual.shape[0] == 0 or text.shape[0] == 0:
        return torch.cat([visual, text])
    parts = [rows.view(shards, rows.shape[0] // shards, *rows.shape[1:]) for rows in (visual, text)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def split_shards(
    rows: torch.Tensor, num_visual: int, shards: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of `interleave_shards`: `[V]` and `[T]` of the whole pack."""
    if shards == 1 or num_visual in (0, rows.shape[0]):
        return rows[:num_visual], rows[num_visual:]
    here = num_visual // shards
    split = rows.view(shards, rows.shape[0] // shards, *rows.shape[1:])
    return split[:, :here].flatten(0, 1), split[:, here:].flatten(0, 1)


def build_seq_params(
    layouts: Sequence[Layout],
    *,
    t2v_position: T2VPosition,
    multiple: int = 1,
    at_least: tuple[int, int] = (0, 0),
    device: torch.device | str = "cpu",
    images_of: Sequence[int] = (),
) -> DecomposedSeqParams:
    """Works out rows, visibility and positions of a pack.

    Args:
        layouts: runs of each sample, in reading order.
        t2v_position: `none` (text positions count text rows only, visual positions visual rows
            only) or `rope` (both count all rows of the sample in reading order).
        multiple: row counts are padded up to this; a multiple of the tensor parallel size where
            sequence parallelism is on.
        at_least: visual and text rows to pad up to (multiples of `multiple`), so that all
            micro-batches of a step have one shape in the pipeline.
        device: where the index tensors live.
        images_of: for each sample the number of its visual unit (`types.visual_units`): the visual
            rows of a unit stand once, and each of its samples sees them where its own layout has
            them. Empty: no sample shares any.

    Returns:
        The metadata that travels in Megatron-Core's `packed_seq_params`.

    Raises:
        ValueError: images are shared with `rope`, where a row has one place in one sample; or
            `images_of` does not fit the layouts.
    """
    if images_of and t2v_position == "rope":
        raise ValueError("visual rows with positions on the text's axis cannot be shared")
    units = visual_units(layouts, images_of)
    firsts = [0, *itertools.accumulate(units)]
    num_visual, num_text = map(max, padded_rows(layouts, multiple, images_of), at_least)
    reading = np.zeros(num_visual + num_text, dtype=np.int64)
    own_kind = np.zeros(num_visual + num_text, dtype=np.int64)
    order: list[np.ndarray] = []
    blocks: list[Block] = []
    text_lengths = []
    t = 0
    for layout, unit in zip(layouts, images_of or range(len(layouts)), strict=True):
        v = v_first = 0 if unit == NO_IMAGES else firsts[unit]
        t_first, position = t, 0
        for is_visual, rows in layout:
            start = v if is_visual else num_visual + t
            span = np.arange(start, start + rows)
            reading[span] = np.arange(position, position + rows)
            first = v - v_first if is_visual else t - t_first
            own_kind[span] = np.arange(first, first + rows)
            order.append(span)
            position += rows
            if is_visual:
                v += rows
            else:
                if rows and v > v_first:
                    blocks.append(Block(t, t + rows, v_first, v))
                t += rows
        text_lengths.append(t - t_first)
    check_blocks(blocks)
    positions = reading if t2v_position == "rope" else own_kind
    if images_of or not order:
        order = [np.zeros(0, dtype=np.int64)]

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return DecomposedSeqParams(
        qkv_format="thd",
        num_visual=num_visual,
        num_text=num_text,
        text_lengths=tuple(text_lengths),
        visual_lengths=units,
        blocks=tuple(blocks),
        reading_order=tensor(np.concatenate(order)),
        text_positions=tensor(positions[num_visual:]),
        visual_positions=tensor(positions[:num_visual]),
    )


def to_device(params: DecomposedSeqParams, device: torch.device) -> DecomposedSeqParams:
    """The same, with its index tensors on a device."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, non_blocking=True)

    context = params.context
    if context is not None:
        context = replace(
            context,
            text_positions=moved(context.text_positions),
            order=moved(context.order),
            place=moved(context.place),
        )
    return replace(
        params,
        reading_order=moved(params.reading_order),
        text_positions=moved(params.text_positions),
        visual_positions=moved(params.visual_positions),
        context=context,
    )
