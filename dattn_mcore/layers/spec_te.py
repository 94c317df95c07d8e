"""The same layers on Transformer Engine: its linears, norms and, in the tower, its attention.

Parameters have the names, shapes and shards of the local modules, so a checkpoint of one spec loads
into the other. Importing this file needs Transformer Engine; `Runtime.implementation` asks for it.

FP8 products are Transformer Engine's own affair: Megatron-Core's `TransformerBlock` enters its FP8
context around each layer of the language model, and everything that is not one of these linears
(the project's attention, the folded projection of visual rows, embeddings, logits) stays in bf16.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from dattn_mcore.errors import ConfigError
from dattn_mcore.layers.adaptable import Adaptable
from dattn_mcore.layers.layer_parts import LayerParts
from dattn_mcore.layers.linear import fold


def _without_overlap(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a linear that exchanges rows of another number than the buffers'."""
    config = copy.copy(kwargs["config"])
    config.tp_comm_overlap = False
    return {**kwargs, "config": config}


class TextColumnLinear(TEColumnParallelLinear):
    """Column-parallel linear on text rows alone (`linear_q`)."""

    def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, **_without_overlap(kwargs))


class KeyValueColumnLinear(TEColumnParallelLinear):
    """Column-parallel linear on all rows (`linear_kv`)."""

    def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, **{"tp_comm_buffer_name": "qkv", **kwargs})


class TextRowLinear(TERowParallelLinear):
    """Row-parallel linear on text rows alone (the last layer's MLP)."""

    def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, **_without_overlap(kwargs))


class FoldableRowLinear(TERowParallelLinear):
    """Row-parallel projection with the cheaper way for visual rows; see `layers.linear`.

    Text rows take Transformer Engine's product (FP8 where it is on). Visual rows take the folded
    weight in bf16, groups / heads of the work, and a reduction of their own.
    """

    def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, **_without_overlap(kwargs))
        # The weight has two gradients here. Fused accumulation would write Transformer Engine's
        # into the buffer and make DDP drop the other.
        self.fuse_wgrad_accumulation = False

    def forward(
        self, input_: torch.Tensor, values: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Shapes are those of `layers.linear.FoldableRowParallelLinear`."""
        text, bias = super().forward(input_)
        if values is None:
            return text, bias
        assert bias is None, "the bias of a folded projection is not implemented"
        head_dim = self.config.kv_channels
        rows = values.flatten(1)
        folded = fold(self.weight, rows.shape[1] // head_dim, head_dim)
        visual = (rows @ folded.t())[:, None]
        if self.config.sequence_parallel:
            visual = reduce_scatter_to_sequence_parallel_region(visual, group=self._tp_group)
        else:
            visual = reduce_from_tensor_model_parallel_region(visual, group=self._tp_group)
        return torch.cat([visual, text]), None


class PostNorm:
    """Mixed into a linear: its output is normalised before the residual is added."""

    def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, **kwargs)  # type: ignore[call-arg]
        config = kwargs["config"]
        self.post_norm = TENorm(config, output_size, config.layernorm_epsilon)

    def forward(
        self, input_: torch.Tensor, values: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, None]:
        """Shapes are those of the linear; of the folded projection see `layers.linear`."""
        arguments = (input_,) if values is None else (input_, values)
        output, bias = super().forward(*arguments)  # type: ignore[misc]
        return self.post_norm(output if bias is None else output + bias), None


class FoldableRowLinearWithPostNorm(PostNorm, FoldableRowLinear):
    """A projection whose output is normalised before the residual is added."""


class RowLinearWithPostNorm(PostNorm, TERowParallelLinear):
    """The MLP's second linear, whose output is normalised."""


class TextRowLinearWithPostNorm(PostNorm, TextRowLinear):
    """The same on text rows alone."""


PARTS = LayerParts(
    norm=TENorm,
    linear_q=TextColumnLinear,
    linear_kv=KeyValueColumnLinear,
    linear_proj=FoldableRowLinear,
    linear_proj_post_norm=FoldableRowLinearWithPostNorm,
    linear_fc1=TEColumnParallelLinear,
    linear_fc2=TERowParallelLinear,
    linear_fc2_post_norm=RowLinearWithPostNorm,
    text_fc1=TextColumnLinear,
    text_fc2=TextRowLinear,
    text_fc2_post_norm=TextRowLinearWithPostNorm,
    column=TEColumnParallelLinear,
    row=TERowParallelLinear,
    bidirectional_attention=TEDotProductAttention,
)


class AdaptableTextColumn(Adaptable, TextColumnLinear):
    """`TextColumnLinear` that can have an adapter, as all below."""


class AdaptableKeyValueColumn(Adaptable, KeyValueColumnLinear):
    """Column-parallel linear on all rows."""


class AdaptableColumn(Adaptable, TEColumnParallelLinear):
    """The MLP's first linear."""


class AdaptableFoldableRow(Adaptable, FoldableRowLinear):
    """Row-parallel projection with the cheaper way for visual rows."""


class AdaptableRow(Adaptable, TERowParallelLinear):
    """The MLP's second linear."""


class AdaptableTextRow(Adaptable, TextRowLinear):
    """The same on text rows alone."""


class AdaptableFoldableRowWithPostNorm(PostNorm, Adaptable, FoldableRowLinear):
    """The projection, its output normalised; the adapter comes before the norm."""


class AdaptableRowWithPostNorm(PostNorm, Adaptable, TERowParallelLinear):
    """The MLP's second linear, likewise."""


class AdaptableTextRowWithPostNorm(PostNorm, Adaptable, TextRowLinear):
    """The same on text rows alone."""


ADAPTABLE_PARTS = replace(
    PARTS,
    linear_q=AdaptableTextColumn,
    linear_kv=AdaptableKeyValueColumn,
    linear_proj=AdaptableFoldableRow,
    linear_proj_post_norm=AdaptableFoldableRowWithPostNorm,
    linear_fc1=AdaptableColumn,
    linear_fc2=AdaptableRow,
    linear_fc2_post_norm=AdaptableRowWithPostNorm,
    text_fc1=AdaptableTextColumn,
    text_fc2=AdaptableTextRow,
    text_fc2_post_norm=AdaptableTextRowWithPostNorm,
)


def start_overlap(
    rows: int, hidden_size: int, tp_size: int, fp8: bool, bf16: bool, backend: str
) -> None:
    """Registers the buffers of `parallel.tp_comm_overlap`; once, before the first step.

    Args:
        rows: visual and text rows of every micro-batch (`data.fixed_rows`).
        hidden_size: of the language model.
        tp_size: tensor parallel size.
        fp8: whether any layer's linears run in FP8.
        bf16: whether any layer's linears run in bf16; both kinds look for buffers of their own.
        backend: of torch.distributed, for the exchange of handles.

    Raises:
        ConfigError: this Transformer Engine is older than the call.
    """
    try:
        from transformer_engine.pytorch.module.base import (
            UserBufferQuantizationMode,
            initialize_ub,
        )
    except ImportError as error:
        raise ConfigError(
            "parallel.tp_comm_overlap=true needs Transformer Engine 2.8 or newer; update it, or "
            "set the overlap off"
        ) from error
    modes = [UserBufferQuantizationMode.FP8] * fp8 + [UserBufferQuantizationMode.NONE] * bf16
    initialize_ub(
        shape=[rows, hidden_size],
        tp_size=tp_size,
        quantization_modes=modes,
        bootstrap_backend=backend,
    )
