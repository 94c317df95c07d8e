"""What an attention backend has to compute."""

from __future__ import annotations

from dataclasses import dataclass


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
    v2v: str = "diagonal"
    t2v_position: str = "none"
    merge: str = "alpha"

    @property
    def debiased(self) -> bool:
        """Whether text looks at visual rows without positions."""
        return self.t2v_position == "none"

    @property
    def is_baseline(self) -> bool:
        """Whether this is stock causal self-attention over the rows in reading order."""
        return (self.v2v, self.t2v_position, self.merge) == ("causal", "rope", "alpha")
