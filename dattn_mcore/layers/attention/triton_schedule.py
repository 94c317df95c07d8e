"""What a call of the joint kernel computes: who sees what, which logits, from which tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np
import torch

from dattn_mcore.layers.attention.modes import Causal
from dattn_mcore.layers.attention.triton_tuning import Tuning
from dattn_mcore.layers.attention.visible_ranges import (
    Ranges,
    block_key_tiles,
    block_ranges,
    causal_key_tiles,
    causal_ranges,
    pieces_of,
    query_tiles,
)
from dattn_mcore.layers.blocks import Block

KeyKind = Literal["text", "visual"]
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class DeviceKeyTiles:
    """`visible_ranges.KeyTiles` on the device.

    Attributes:
        tiles, intervals, most: see there.
        keys: rows up to the end of the last tile.
    """

    tiles: torch.Tensor
    intervals: torch.Tensor
    most: int
    keys: int


@dataclass
class Schedule:
    """Which rows ask and what they see, with the index tensors derived from it, once per pack.

    Attributes:
        causal: what query rows see of the causal (text) key set; they are its rows.
        blocks: what they see of the visual keys.
        device: where the index tensors live.
    """

    causal: Causal
    blocks: tuple[Block, ...]
    device: torch.device
    cache: dict = field(default_factory=dict)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Query rows per sample."""
        return self.causal.lengths

    @cached_property
    def rows(self) -> int:
        """Real query rows."""
        return sum(self.lengths)

    @cached_property
    def text(self) -> Ranges:
        """Visible ranges of the text keys."""
        return causal_ranges(self.lengths, self.causal.window)

    @cached_property
    def visual(self) -> Ranges:
        """Visible ranges of the visual keys."""
        return block_ranges(pieces_of(self.blocks), self.rows)

    @property
    def slots(self) -> int:
        """Ranges of visual keys of a row, at most."""
        return len(self.visual.low)

    def bounds(self) -> torch.Tensor:
        """int32 [2 + 2 * slots, rows]: low and high of the text keys, then of each visual slot."""
        return self._once("bounds", self._bounds)

    def query_tiles(self, rows: int) -> torch.Tensor:
        """See `visible_ranges.query_tiles`."""
        return self._once(
            ("query", rows),
            lambda: self._moved(query_tiles(self.lengths, rows, self.text, self.visual)),
        )

    def key_tiles(self, kind: KeyKind, rows: int) -> DeviceKeyTiles:
        """See `visible_ranges.KeyTiles`."""
        return self._once((kind, rows), lambda: self._key_tiles(kind, rows))

    def _bounds(self) -> torch.Tensor:
        pairs = zip(self.visual.low, self.visual.high, strict=True)
        columns = [self.text.low[0], self.text.high[0], *(end for pair in pairs for end in pair)]
        return self._moved(np.stack(columns))

    def _key_tiles(self, kind: KeyKind, rows: int) -> DeviceKeyTiles:
        if kind == "text":
            made = causal_key_tiles(self.lengths, self.causal.window, rows)
        else:
            made = block_key_tiles(pieces_of(self.blocks), rows)
        return DeviceKeyTiles(
            tiles=self._moved(made.tiles),
            intervals=self._moved(made.intervals),
            most=made.most,
            keys=int(made.tiles[:, 1].max(initial=0)),
        )

    def _moved(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _once(self, key: object, make: Callable[[], _Made]) -> _Made:
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]


@dataclass(frozen=True)
class Setting:
    """What a call computes.

    Attributes:
        scale, softcap: as in `AttentionOptions`.
        debiased: visual keys meet the query as it is, else the rotated one.
        has_visual, has_text: key sets that take part.
        tuning: block sizes that the caller fixes.
    """

    scale: float
    softcap: float | None
    debiased: bool
    has_visual: bool
    has_text: bool
    tuning: Tuning = Tuning()

    def logits(self) -> dict[str, object]:
        """Arguments of the kernels that say how products become logits."""
        capped = self.softcap is not None
        return {
            "multiplier": (self.softcap or self.scale) * math.log2(math.e),
            "cap_scale": self.scale / self.softcap if self.softcap is not None else 1.0,
            "HAS_CAP": capped,
        }


@dataclass(frozen=True)
class Keys:
    """Keys and values of both sets, [rows, groups, head_dim], text keys rotated."""

    text: torch.Tensor
    text_values: torch.Tensor
    visual: torch.Tensor
    visual_values: torch.Tensor

    def pointers(self) -> dict[str, object]:
        """Arguments of the kernels over queries."""
        named = {
            "text_key": self.text,
            "text_value": self.text_values,
            "visual_key": self.visual,
            "visual_value": self.visual_values,
        }
        arguments: dict[str, object] = {f"{name}s": x for name, x in named.items()}
        arguments |= {f"{name}_stride": x.stride(0) for name, x in named.items()}
        return arguments | {f"{name}_group": x.stride(1) for name, x in named.items()}
