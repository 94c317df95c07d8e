"""What an attention backend is."""

from __future__ import annotations

from typing import Protocol

import torch

from dattn_mcore.layers.attention.inputs import AttentionInputs
from dattn_mcore.layers.attention.options import AttentionOptions


class Backend(Protocol):
    """One way to compute decomposed attention. No backend communicates.

    Attributes:
        name: value of `attention.backend`.
        needs_gpu: `auto` does not consider it on a CPU.
    """

    @property
    def name(self) -> str:
        """See the class."""

    @property
    def needs_gpu(self) -> bool:
        """See the class."""

    def refuses(
        self, options: AttentionOptions, device_type: str, dtype: torch.dtype, head_dim: int
    ) -> str | None:
        """Why it cannot run here or compute this; None if it can.

        Args:
            options: what the layer computes.
            device_type: cpu, or another for a GPU.
            dtype: of activations.
            head_dim: size of a head.
        """

    def describe(self, head_dim: int) -> str:
        """What computes this model, and which version; empty where there is nothing to say."""

    def attend(
        self, inputs: AttentionInputs, options: AttentionOptions
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of all rows that have a query.

        Returns:
            Output of the text rows [T, heads, head_dim]; that of the visual rows
            [V, heads, head_dim] with `v2v=causal`, else None. Padding rows are zero.
        """
