"""What a call of the joint kernel computes: who sees what, which logits, from which tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from dattn_mcore.layers.attention.triton_tuning import Tuning
from dattn_mcore.layers.attention.visible_ranges import Ranges, key_tiles, query_tiles


@dataclass
class Plan:
    """Which rows ask and what they see, with the index tensors derived from it, once per pack.

    Attributes:
        lengths: query rows per sample.
        visual, text: visible ranges of the dense and of the causal key set.
        device: where the index tensors live.
    """

    lengths: tuple[int, ...]
    visual: Ranges
    text: Ranges
    device: torch.device
    cache: dict = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Real query rows."""
        return len(self.text.low)

    def bounds(self) -> torch.Tensor:
        """int32 [4, rows]: visual low, visual high, text low, text high."""
        columns = (self.visual.low, self.visual.high, self.text.low, self.text.high)
        return self._once("bounds", lambda: torch.stack([torch.from_numpy(c) for c in columns]))

    def query_tiles(self, rows: int) -> torch.Tensor:
        """See `visible_ranges.query_tiles`."""
        return self._once(
            ("query", rows),
            lambda: torch.from_numpy(query_tiles(self.lengths, rows, self.visual, self.text)),
        )

    def key_tiles(self, kind: str, rows: int) -> torch.Tensor:
        """See `visible_ranges.key_tiles`; kind is visual or text."""
        ranges: Ranges = getattr(self, kind)
        return self._once(
            (kind, rows), lambda: torch.from_numpy(key_tiles(self.lengths, rows, ranges))
        )

    def _once(self, key: object, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if key not in self.cache:
            self.cache[key] = make().to(self.device, non_blocking=True)
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
