"""Norms of queries and keys, before they are rotated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from dattn_mcore.architectures.features import HeadAxis


def build_qk_norm(
    axes: Sequence[HeadAxis],
    head_norm: ModuleSpec | type | None,
    *,
    config: TransformerConfig,
    heads: int,
    tp_group: torch.distributed.ProcessGroup,
) -> torch.nn.Module | None:
    """The norm of a layer's queries or keys; None where they are not normed.

    It takes [rows, heads of this rank, head_dim] and returns the same shape.

    Args:
        axes: which of `heads` and `head_dim` are normed together; none: there is no norm.
        head_norm: norm of the last axis, whose weight every rank holds.
        config: Megatron-Core's layer configuration.
        heads: of the whole layer, query heads or key/value heads.
        tp_group: ranks that share the heads.
    """
    if not axes:
        return None
    assert tuple(axes) == ("head_dim",), "norms over other axes are not implemented"
    return build_module(
        head_norm,
        config=config,
        hidden_size=config.kv_channels,
        eps=config.layernorm_epsilon,
    )
