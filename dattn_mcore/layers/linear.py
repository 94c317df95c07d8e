"""A row-parallel projection followed by a norm: Gemma 2's post-attention and post-MLP norms."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import RowParallelLinear

from dattn_mcore.layers.norm import Norm


class RowParallelLinearWithPostNorm(RowParallelLinear):
    """Megatron-Core's row-parallel linear whose output is normalised before the residual is added.

    Swapped in for `linear_proj` and `linear_fc2` by the layer spec, so that the transformer layer
    itself stays Megatron-Core's own. Adds the parameter `post_norm.weight` (replicated).
    """

    def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, **kwargs)
        self.post_norm = Norm(kwargs["config"], output_size, kwargs["config"].layernorm_epsilon)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Takes [rows, 1, input_size / tp]; returns [rows (/ tp with sp), 1, output_size]."""
        output, bias = super().forward(input_)
        if bias is not None:
            output = output + bias
        return self.post_norm(output), None
