"""Megatron-Core's `TransformerConfig` for each part of the model, from the run's configuration."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu
from megatron.core.transformer.transformer_config import TransformerConfig

from dattn_mcore.config.schema import Config
from dattn_mcore.parallel.platform import current_device

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}


def params_dtype(config: Config) -> torch.dtype:
    """Dtype of parameters and activations."""
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def _leave_as_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _common(config: Config) -> dict[str, Any]:
    dtype = params_dtype(config)
    return dict(
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=config.parallel.tp,
        # models.initialize fills weights alike in every layout. Megatron-Core must still "do" its
        # own initialisation: it marks there which parameters are tensor parallel.
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        embedding_init_method=_leave_as_is,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,
    )


def llm_transformer_config(config: Config) -> TransformerConfig:
    """The language model; its pipeline settings also drive the schedule."""
    llm, parallel = config.model.llm, config.parallel
    recompute: dict[str, Any] = {}
    if config.train.recompute == "full":
        recompute = dict(
            recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
        )
    elif config.train.recompute == "selective":
        recompute = dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    return TransformerConfig(
        num_layers=llm.num_layers,
        hidden_size=llm.hidden_size,
        ffn_hidden_size=llm.ffn_hidden_size,
        num_attention_heads=llm.num_attention_heads,
        num_query_groups=llm.num_query_groups,
        kv_channels=llm.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=llm.norm_eps,
        layernorm_zero_centered_gamma=llm.zero_centered_gamma,
        gated_linear_unit=True,
        activation_func=ACTIVATIONS[llm.activation],
        add_bias_linear=False,
        sequence_parallel=parallel.sp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        pipeline_dtype=params_dtype(config),
        # With two stages, batched exchanges of the interleaved schedule would mix up what goes to
        # the next and to the previous stage, which are the same process.
        overlap_p2p_comm=parallel.vpp > 1,
        batch_p2p_comm=parallel.vpp == 1,
        # The interleaved schedule empties an output while it is still being sent. A GPU's stream
        # keeps the memory until then; a CPU's sender would read what has been freed.
        deallocate_pipeline_outputs=parallel.vpp == 1 or current_device().type != "cpu",
        **recompute,
        **_common(config),
    )


def vision_transformer_config(config: Config) -> TransformerConfig:
    """The vision tower: whole on the first stage, tensor parallel, no sequence parallelism."""
    vision = config.model.vision
    skipped = -1 - vision.select_layer  # -2 leaves out the last layer
    return TransformerConfig(
        num_layers=vision.num_layers - skipped,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        kv_channels=vision.hidden_size // vision.num_attention_heads,
        normalization="LayerNorm",
        layernorm_epsilon=vision.norm_eps,
        activation_func=ACTIVATIONS[vision.activation],
        add_bias_linear=True,
        **_common(config),
    )


def projector_transformer_config(config: Config) -> TransformerConfig:
    """The projector's MLP and norms: visual rows are replicated over the tensor parallel group."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=config.model.llm.hidden_size,
        ffn_hidden_size=config.model.projector.ffn_hidden_size,
        num_attention_heads=config.parallel.tp,
        normalization="RMSNorm",
        layernorm_epsilon=config.model.projector.norm_eps,
        activation_func=ACTIVATIONS["gelu"],
        add_bias_linear=True,
        **_common(config),
    )
