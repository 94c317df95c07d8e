"""What an attention backend is."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from dattn_mcore.layers.attention.inputs import AttentionInputs
from dattn_mcore.layers.attention.modes import KeySet
from dattn_mcore.layers.attention.options import AttentionOptions
from dattn_mcore.layers.layout import DecomposedSeqParams


class Part(Protocol):
    """Attention of some rows over one of the sets of keys of their softmax.

    Queries and keys are given as they meet, rotated where the set is.
    """

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """From q [rows, heads, d], k and v [keys, groups, d].

        Returns:
            Output [rows, heads, d] in the queries' dtype; log-sum-exp [rows, heads] in float32 or
            wider, minus infinity (and output zero) where nothing is seen; and what the backward
            pass needs besides.
        """

    def backward(
        self,
        grad: torch.Tensor,
        *,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        state: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q, k, v for the output and log-sum-exp of the whole softmax."""


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

    def part(
        self,
        key_set: KeySet,
        params: DecomposedSeqParams,
        options: AttentionOptions,
        device: torch.device,
    ) -> Part:
        """Attention over one set of keys, of rows that are divided by context parallelism.

        Args:
            key_set: from `modes.divided_key_sets`.
            params: of this rank's rows; what is derived once per pack is kept there.
            options: what the layer computes.
            device: where its index tensors go.
        """
