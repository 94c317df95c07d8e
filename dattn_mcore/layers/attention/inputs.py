"""What goes into an attention backend: the rows of a pack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from dattn_mcore.layers.attention.frequencies import query_factor
from dattn_mcore.layers.attention.rotary import Rotary, rotate
from dattn_mcore.layers.layout import DecomposedSeqParams

# Of a pack: its text rows, its visual rows, or both, sample after sample in reading order
# (without padding).
RowKind = Literal["text", "visual", "reading"]


@dataclass(frozen=True)
class AttentionInputs:
    """Queries, keys and values of one layer and one pack, none of them rotated.

    T and V are the text and visual rows of the whole pack, padding included. Heads and groups are
    those of this tensor parallel rank.

    Attributes:
        q: [T, heads, head_dim], queries of the text rows.
        k_text, v_text: [T, groups, head_dim].
        k_visual, v_visual: [V, groups, head_dim].
        q_visual: [V, heads, head_dim] with `v2v=causal`, else None.
        rotary: positions of the text rows, and of the visual rows where the mode has them.
        params: which row is what, and what text rows see of the visual rows.
    """

    q: torch.Tensor
    k_text: torch.Tensor
    v_text: torch.Tensor
    k_visual: torch.Tensor
    v_visual: torch.Tensor
    q_visual: torch.Tensor | None
    rotary: Rotary
    params: DecomposedSeqParams

    def queries(self, kind: RowKind) -> torch.Tensor:
        """[rows, heads, head_dim]; visual rows only where they have queries."""
        return self._take(kind, text=self.q, visual=self.q_visual)

    def keys(self, kind: RowKind) -> torch.Tensor:
        """[rows, groups, head_dim]."""
        return self._take(kind, text=self.k_text, visual=self.k_visual)

    def values(self, kind: RowKind) -> torch.Tensor:
        """[rows, groups, head_dim]."""
        return self._take(kind, text=self.v_text, visual=self.v_visual)

    def angles(self, kind: RowKind) -> torch.Tensor:
        """[rows, 1, 1, head_dim]."""
        return self._take(kind, text=self.rotary.text, visual=self.rotary.visual)

    def positions(self, kind: RowKind) -> torch.Tensor:
        """int64 [rows]."""
        text, visual = self.params.text_positions, self.params.visual_positions
        return self._take(kind, text=text, visual=visual)

    def query_factor(self, kind: RowKind) -> torch.Tensor | None:
        """What queries are multiplied by where they are rotated, [rows, 1, 1, 1]; None for 1."""
        return query_factor(self.positions(kind), self.rotary.rope, self.rotary.text.dtype)

    def rotated_queries(self, kind: RowKind) -> torch.Tensor:
        """`queries` at their positions."""
        return rotate(self.queries(kind), self.angles(kind), self.query_factor(kind))

    def rotated_keys(self, kind: RowKind) -> torch.Tensor:
        """`keys` at their positions."""
        return rotate(self.keys(kind), self.angles(kind))

    def _take(
        self, kind: RowKind, *, text: torch.Tensor, visual: torch.Tensor | None
    ) -> torch.Tensor:
        if kind == "text":
            return text
        assert visual is not None
        if kind == "visual":
            return visual
        return torch.cat([visual, text])[self.params.reading_order]
