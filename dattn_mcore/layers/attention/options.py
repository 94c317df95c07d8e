"""What an attention backend has to compute."""

from __future__ import annotations

from dataclasses import dataclass

from dattn_mcore.types import V2V, Merge, T2VPosition


@dataclass(frozen=True)
class AttentionOptions:
    """Settings of one layer's attention.

    Attributes:
        scale: factor on q k^T, before the soft-cap.
        softcap: logits become softcap * tanh(logits / softcap); None for no cap.
        window: keys a query sees, itself included, counted in positions; None for all. It
            concerns every pair of rows rotated on one position axis: text to text in D-Attn
            (`t2v_position=none`), all pairs with `t2v_position=rope`.
        v2v, t2v_position, merge: see `config.schema.AttentionConfig`.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    v2v: V2V = "diagonal"
    t2v_position: T2VPosition = "none"
    merge: Merge = "alpha"

    @property
    def debiased(self) -> bool:
        """Whether text looks at visual rows without positions."""
        return self.t2v_position == "none"

    @property
    def is_baseline(self) -> bool:
        """Whether this is stock causal self-attention over the rows in reading order."""
        return (self.v2v, self.t2v_position, self.merge) == ("causal", "rope", "alpha")

    @property
    def window_skips_positions(self) -> bool:
        """Whether the window counts positions that the rows of a softmax do not all have.

        Then it is no number of rows, and only `reference`, which compares positions, can compute
        it: text rows on one axis with visual rows, in a softmax of their own.
        """
        return self.window is not None and not self.debiased and not self.is_baseline
