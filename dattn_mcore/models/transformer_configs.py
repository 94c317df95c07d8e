"""Megatron-Core's `TransformerConfig` for each part of the model, from the run's configuration."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu
from megatron.core.transformer.transformer_config import TransformerConfig

from dattn_mcore.architectures import text_features, tower_features
from dattn_mcore.config.schema import Config
from dattn_mcore.errors import ConfigError
from dattn_mcore.layers.implementation import TRANSFORMER_ENGINE, choose_implementation
from dattn_mcore.parallel.platform import apex_adds_gradients, current_device

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
        deterministic_mode=config.train.deterministic,
    )


def fuses_gradients(config: Config) -> bool:
    """Whether the decoder's linears add weight gradients into the buffers themselves.

    Transformer Engine's always can; Megatron-Core's own need Apex's extension.
    """
    if choose_implementation(config) == TRANSFORMER_ENGINE:
        return True
    return current_device().type != "cpu" and apex_adds_gradients()


def edge_layers_in_bf16(config: Config) -> int:
    """Decoder layers at each end that an FP8 run computes in bf16."""
    few = config.train.fp8_bf16_layers
    if few is None:
        return 0 if config.train.fp8 == "delayed" else 1
    return few


def _fp8(config: Config) -> dict[str, Any]:
    train = config.train
    if train.fp8 == "none":
        return {}
    edge = edge_layers_in_bf16(config)
    settings: dict[str, Any] = dict(
        fp8="hybrid",
        fp8_recipe=train.fp8,
        first_last_layers_bf16=edge > 0,
        num_layers_at_start_in_bf16=edge,
        num_layers_at_end_in_bf16=edge,
    )
    if train.fp8 == "delayed":
        # Transformer Engine's own defaults. Megatron-Core's, the last step alone, follow too
        # closely what a single batch does.
        settings |= dict(fp8_amax_history_len=1024, fp8_amax_compute_algo="max")
    return settings


def llm_transformer_config(config: Config) -> TransformerConfig:
    """The language model; its pipeline settings also drive the schedule."""
    llm, parallel, features = config.model.llm, config.parallel, text_features(config.model)
    recompute: dict[str, Any] = {}
    if config.train.recompute == "full":
        few = config.train.recompute_layers
        recompute = dict(
            recompute_granularity="full",
            recompute_method="uniform" if few is None else "block",
            recompute_num_layers=few or 1,
        )
    elif config.train.recompute == "selective":
        if (
            "layernorm" in config.train.recompute_modules
            and choose_implementation(config) != TRANSFORMER_ENGINE
        ):
            raise ConfigError(
                "train.recompute_modules with layernorm needs Transformer Engine, and this run "
                "takes the local linears; leave layernorm out"
            )
        recompute = dict(
            recompute_granularity="selective",
            recompute_modules=list(config.train.recompute_modules),
        )
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
        gated_linear_unit=True,
        activation_func=ACTIVATIONS[features.activation],
        add_bias_linear=False,
        add_qkv_bias=features.qkv_bias,
        qk_layernorm=features.qk_norm,
        sequence_parallel=parallel.sp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        tp_comm_overlap=parallel.tp_comm_overlap,
        pipeline_dtype=params_dtype(config),
        # With two stages, batched exchanges of the interleaved schedule would mix up what goes to
        # the next and to the previous stage, which are the same process.
        overlap_p2p_comm=parallel.vpp > 1,
        batch_p2p_comm=parallel.vpp == 1,
        # The interleaved schedule empties an output while it is still being sent. A GPU's stream
        # keeps the memory until then; a CPU's sender would read what has been freed.
        deallocate_pipeline_outputs=parallel.vpp == 1 or current_device().type != "cpu",
        **recompute,
        **_fp8(config),
        **{**_common(config), "gradient_accumulation_fusion": fuses_gradients(config)},
    )


def vision_transformer_config(config: Config) -> TransformerConfig:
    """The vision tower: whole on the first stage, tensor parallel, no sequence parallelism."""
    vision, features = config.model.vision, tower_features(config.model)
    return TransformerConfig(
        num_layers=vision.layers_run,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        kv_channels=vision.hidden_size // vision.num_attention_heads,
        normalization=features.normalization,
        layernorm_epsilon=vision.norm_eps,
        gated_linear_unit=features.gated_mlp,
        activation_func=ACTIVATIONS[vision.activation],
        add_bias_linear=features.linear_bias,
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
