"""Megatron-Core's `TransformerConfig` for each part of the model."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from dattn_mcore.architectures import text_features, tower_features
from dattn_mcore.architectures.sizes import ModelConfig
from dattn_mcore.layers.activations import activation_function, mlp_settings
from dattn_mcore.layers.runtime import Runtime


def _leave_as_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _common(runtime: Runtime, tp_size: int) -> dict[str, Any]:
    return dict(
        params_dtype=runtime.dtype,
        bf16=runtime.dtype is torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp_size,
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
        deterministic_mode=runtime.deterministic,
    )


def _fp8(runtime: Runtime) -> dict[str, Any]:
    fp8 = runtime.fp8
    if fp8 is None:
        return {}
    settings: dict[str, Any] = dict(
        fp8="hybrid",
        fp8_recipe=fp8.recipe,
        first_last_layers_bf16=fp8.bf16_layers > 0,
        num_layers_at_start_in_bf16=fp8.bf16_layers,
        num_layers_at_end_in_bf16=fp8.bf16_layers,
    )
    if fp8.recipe == "delayed":
        # Transformer Engine's own defaults. Megatron-Core's, the last step alone, follow too
        # closely what a single batch does.
        settings |= dict(fp8_amax_history_len=1024, fp8_amax_compute_algo="max")
    return settings


def _recompute(runtime: Runtime) -> dict[str, Any]:
    recompute = runtime.recompute
    if recompute.granularity == "full":
        return dict(
            recompute_granularity="full",
            recompute_method="uniform" if recompute.layers is None else "block",
            recompute_num_layers=recompute.layers or 1,
        )
    if recompute.granularity == "selective":
        return dict(recompute_granularity="selective", recompute_modules=list(recompute.modules))
    return {}


def llm_transformer_config(
    model: ModelConfig, runtime: Runtime, *, tp_size: int, pp_size: int, cp_size: int = 1
) -> TransformerConfig:
    """The language model; its pipeline settings also drive the schedule.

    Args:
        model: sizes, and the family.
        runtime: how it is computed.
        tp_size: ranks of the tensor parallel group.
        pp_size: pipeline stages.
        cp_size: ranks of the context parallel group.
    """
    llm, features = model.llm, text_features(model)
    interleaved = runtime.chunks_per_stage > 1
    common = _common(runtime, tp_size)
    common["gradient_accumulation_fusion"] = runtime.gradient_accumulation_fusion
    return TransformerConfig(
        num_layers=llm.num_layers,
        hidden_size=llm.hidden_size,
        ffn_hidden_size=llm.ffn_hidden_size,
        num_attention_heads=llm.num_attention_heads,
        num_query_groups=llm.num_query_groups,
        kv_channels=llm.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=llm.norm_eps,
        layernorm_zero_centered_gamma=features.zero_centered_gamma,
        **mlp_settings(features.activation, gated=True),
        add_bias_linear=False,
        add_qkv_bias=features.qkv_bias,
        qk_layernorm=bool(features.qk_norm),
        sequence_parallel=runtime.sequence_parallel,
        pipeline_model_parallel_size=pp_size,
        context_parallel_size=cp_size,
        virtual_pipeline_model_parallel_size=runtime.chunks_per_stage if interleaved else None,
        num_layers_in_first_pipeline_stage=runtime.first_stage_layers,
        tp_comm_overlap=runtime.tp_comm_overlap,
        pipeline_dtype=runtime.dtype,
        # With two stages, batched exchanges of the interleaved schedule would mix up what goes to
        # the next and to the previous stage, which are the same process.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=runtime.deallocate_pipeline_outputs,
        **_recompute(runtime),
        **_fp8(runtime),
        **common,
    )


def vision_transformer_config(
    model: ModelConfig, runtime: Runtime, *, tp_size: int
) -> TransformerConfig:
    """The vision tower: whole on the first stage, tensor parallel, no sequence parallelism."""
    vision, features = model.vision, tower_features(model)
    return TransformerConfig(
        num_layers=vision.layers_run,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        kv_channels=vision.hidden_size // vision.num_attention_heads,
        normalization=features.normalization,
        layernorm_epsilon=vision.norm_eps,
        **mlp_settings(vision.activation, gated=features.gated_mlp),
        add_bias_linear=features.linear_bias,
        **_common(runtime, tp_size),
    )


def projector_transformer_config(
    model: ModelConfig, runtime: Runtime, *, tp_size: int
) -> TransformerConfig:
    """The projector's MLP and norms: visual rows are replicated over the tensor parallel group."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=model.llm.hidden_size,
        ffn_hidden_size=model.projector.ffn_hidden_size,
        num_attention_heads=tp_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.projector.norm_eps,
        activation_func=activation_function("gelu"),
        add_bias_linear=True,
        **_common(runtime, tp_size),
    )
