"""The modules of a layer spec by implementation, local or Transformer Engine's."""

from __future__ import annotations

from dataclasses import replace

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from dattn_mcore.layers.adaptable import (
    AdaptableColumn,
    AdaptableFoldableRow,
    AdaptableRow,
    AdaptableRowWithPostNorm,
)
from dattn_mcore.layers.bidirectional_attention import BidirectionalAttention
from dattn_mcore.layers.layer_parts import LayerParts
from dattn_mcore.layers.linear import FoldableRowParallelLinear, RowParallelLinearWithPostNorm
from dattn_mcore.layers.norm import Norm
from dattn_mcore.types import Implementation

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


ADAPTABLE_LOCAL_PARTS = replace(
    LOCAL_PARTS,
    linear_q=AdaptableColumn,
    linear_kv=AdaptableColumn,
    linear_proj=AdaptableFoldableRow,
    linear_proj_post_norm=AdaptableRowWithPostNorm,
    linear_fc1=AdaptableColumn,
    linear_fc2=AdaptableRow,
    linear_fc2_post_norm=AdaptableRowWithPostNorm,
    text_fc1=AdaptableColumn,
    text_fc2=AdaptableRow,
    text_fc2_post_norm=AdaptableRowWithPostNorm,
)


def parts_of(implementation: Implementation, *, adaptable: bool = False) -> LayerParts:
    """The parts of an implementation.

    Args:
        implementation: whose.
        adaptable: the decoder's linears can have adapters (`layers.lora`).
    """
    if implementation == "transformer_engine":
        # An optional package, whose import takes seconds.
        from dattn_mcore.layers.spec_te import ADAPTABLE_PARTS, PARTS

        return ADAPTABLE_PARTS if adaptable else PARTS
    return ADAPTABLE_LOCAL_PARTS if adaptable else LOCAL_PARTS
