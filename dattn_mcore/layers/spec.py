"""Layer specs: which module stands where in Megatron-Core's TransformerLayer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from dattn_mcore.architectures import text_features, tower_features
from dattn_mcore.architectures.sizes import AttentionConfig, LlmConfig, ModelConfig, TowerActivation
from dattn_mcore.layers.activations import activation_function, gated_activation
from dattn_mcore.layers.attention.options import AttentionOptions
from dattn_mcore.layers.decomposed_attention import (
    DecomposedSelfAttention,
    DecomposedSelfAttentionSubmodules,
)
from dattn_mcore.layers.layer_parts import LayerParts
from dattn_mcore.layers.parts import parts_of
from dattn_mcore.layers.runtime import Runtime


def mlp_spec(
    column_parallel: type, row_parallel: type, *, gate: TowerActivation | None = None
) -> Any:
    """Megatron-Core's MLP on two linears, as its layer takes it.

    Args:
        column_parallel: the first linear.
        row_parallel: the second.
        gate: activation of a gated MLP, whose settings are `activations.mlp_settings`; None: it is
            not gated.
    """
    submodules = MLPSubmodules(
        linear_fc1=column_parallel,
        activation_func=gated_activation(activation_function(gate)) if gate else None,
        linear_fc2=row_parallel,
    )
    if hasattr(MLP, "as_mlp_submodule"):  # from 0.18 on, which warns of the other kind
        return partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)


def attention_options(llm: LlmConfig, attention: AttentionConfig) -> AttentionOptions:
    """The attention of this model and mode; the window is each layer's own."""
    return AttentionOptions(
        scale=(llm.query_scale or llm.head_dim) ** -0.5,
        softcap=llm.attention_softcap,
        v2v=attention.v2v,
        t2v_position=attention.t2v_position,
        merge=attention.merge,
    )


def text_rows_bias_dropout_add(training: bool, fused: bool) -> Callable[..., torch.Tensor]:
    """Adds the residual of the text rows to an output that has text rows only.

    Text rows stand last on every shard. In the place of Megatron-Core's `get_bias_dropout_add` it
    lets the last layer leave the visual rows, which nobody reads, behind after attention.
    """
    add = get_bias_dropout_add(training, fused)

    def add_to_text(
        output: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        return add(output, residual[residual.shape[0] - output[0].shape[0] :], dropout)

    return add_to_text


def decoder_layer_spec(
    model: ModelConfig,
    attention: AttentionConfig,
    runtime: Runtime,
    last: bool = False,
    adaptable: bool = False,
) -> ModuleSpec:
    """The language model's layer: decomposed attention, and norms where the family has them.

    Args:
        model: sizes, and the family whose layers these are.
        attention: how attention is decomposed.
        runtime: how the layer is computed.
        last: of the whole model; its visual rows end at their keys and values, unless
            `attention.skip_last_visual_rows` is off.
        adaptable: its linears can have adapters (`layers.lora`).
    """
    llm, parts = model.llm, parts_of(runtime.implementation, adaptable=adaptable)
    features = text_features(model)
    norms = features.norms
    text_only = last and attention.skip_last_visual_rows
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.norm if norms.attention_input else IdentityOp,
            self_attention=ModuleSpec(
                module=DecomposedSelfAttention,
                params={
                    "options": attention_options(llm, attention),
                    "windows": llm.windows,
                    "rotary_kinds": [
                        llm.ropes.index(llm.rope_of(n)) for n in range(llm.num_layers)
                    ],
                    "ropes": [llm.rope_of(n)[1] for n in range(llm.num_layers)],
                    "backend": attention.backend,
                    "fold": attention.fold_visual_projection,
                    "text_only": text_only,
                    "qk_norm": features.qk_norm,
                },
                submodules=DecomposedSelfAttentionSubmodules(
                    linear_q=parts.linear_q,
                    linear_kv=parts.linear_kv,
                    linear_proj=(
                        parts.linear_proj_post_norm if norms.attention_output else parts.linear_proj
                    ),
                    head_norm=parts.norm,
                ),
            ),
            self_attn_bda=text_rows_bias_dropout_add if text_only else get_bias_dropout_add,
            pre_mlp_layernorm=parts.norm if norms.mlp_input else IdentityOp,
            mlp=_decoder_mlp(
                parts, features.activation, normed=bool(norms.mlp_output), text_only=text_only
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _decoder_mlp(parts: LayerParts, gate: TowerActivation, *, normed: bool, text_only: bool) -> Any:
    if text_only:
        last = parts.text_fc2_post_norm if normed else parts.text_fc2
        return mlp_spec(parts.text_fc1, last, gate=gate)
    last = parts.linear_fc2_post_norm if normed else parts.linear_fc2
    return mlp_spec(parts.linear_fc1, last, gate=gate)


def vision_layer_spec(model: ModelConfig, runtime: Runtime) -> ModuleSpec:
    """The vision tower's layer: pre-norm, bidirectional attention, MLP."""
    parts = parts_of(runtime.implementation)
    gate = model.vision.activation if tower_features(model).gated_mlp else None
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=parts.column,
                    core_attention=parts.bidirectional_attention,
                    linear_proj=parts.row,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=parts.norm,
            mlp=mlp_spec(parts.column, parts.row, gate=gate),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_submodules(layers: list[ModuleSpec], runtime: Runtime) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage (or chunk), with a norm at the end."""
    norm = parts_of(runtime.implementation).norm
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)
