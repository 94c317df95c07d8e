"""The modules that a layer spec is made of, local or Transformer Engine's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from dattn_mcore.layers.bidirectional_attention import BidirectionalAttention
from dattn_mcore.layers.linear import FoldableRowParallelLinear, RowParallelLinearWithPostNorm
from dattn_mcore.layers.norm import Norm
from dattn_mcore.types import Implementation


@dataclass(frozen=True)
class LayerParts:
    """Classes by their place; those of `text_` work on the text rows of the last layer alone."""

    norm: Any
    linear_q: Any
    linear_kv: Any
    linear_proj: Any
    linear_proj_post_norm: Any
    linear_fc1: Any
    linear_fc2: Any
    linear_fc2_post_norm: Any
    text_fc1: Any
    text_fc2: Any
    text_fc2_post_norm: Any
    column: Any
    row: Any
    bidirectional_attention: Any


LOCAL_PARTS = LayerParts(
    norm=Norm,
    linear_q=ColumnParallelLinear,
    linear_kv=ColumnParallelLinear,
    linear_proj=FoldableRowParallelLinear,
    linear_proj_post_norm=RowParallelLinearWithPostNorm,
    linear_fc1=ColumnParallelLinear,
    linear_fc2=RowParallelLinear,
    linear_fc2_post_norm=RowParallelLinearWithPostNorm,
    text_fc1=ColumnParallelLinear,
    text_fc2=RowParallelLinear,
    text_fc2_post_norm=RowParallelLinearWithPostNorm,
    column=ColumnParallelLinear,
    row=RowParallelLinear,
    bidirectional_attention=BidirectionalAttention,
)


def parts_of(implementation: Implementation) -> LayerParts:
    """The parts of an implementation."""
    if implementation == "transformer_engine":
        # An optional package, whose import takes seconds.
        from dattn_mcore.layers.spec_te import PARTS

        return PARTS
    return LOCAL_PARTS
