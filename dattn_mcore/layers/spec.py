"""Layer specs: which module stands where in Megatron-Core's TransformerLayer."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
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

from dattn_mcore.config.schema import Config
from dattn_mcore.layers.attention import AttentionOptions
from dattn_mcore.layers.bidirectional_attention import BidirectionalAttention
from dattn_mcore.layers.decomposed_attention import (
    DecomposedSelfAttention,
    DecomposedSelfAttentionSubmodules,
)
from dattn_mcore.layers.linear import RowParallelLinearWithPostNorm
from dattn_mcore.layers.norm import Norm


def mlp_spec(row_parallel: type = RowParallelLinear) -> ModuleSpec:
    """Megatron-Core's MLP on local tensor parallel linears."""
    return ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=row_parallel),
    )


def attention_options(config: Config) -> AttentionOptions:
    """The attention of this model and mode, as a layer needs it."""
    llm, attention = config.model.llm, config.attention
    return AttentionOptions(
        scale=(llm.query_scale or llm.head_dim) ** -0.5,
        softcap=llm.attention_softcap,
        window=llm.sliding_window,
        v2v=attention.v2v,
        t2v_position=attention.t2v_position,
        merge=attention.merge,
    )


def decoder_layer_spec(config: Config) -> ModuleSpec:
    """The language model's layer: decomposed attention, optional post-norms (Gemma 2)."""
    llm = config.model.llm
    row_parallel = RowParallelLinearWithPostNorm if llm.post_norms else RowParallelLinear
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=ModuleSpec(
                module=DecomposedSelfAttention,
                params={
                    "options": attention_options(config),
                    "window_every": llm.sliding_window_every,
                    "backend": config.attention.backend,
                },
                submodules=DecomposedSelfAttentionSubmodules(
                    linear_q=ColumnParallelLinear,
                    linear_kv=ColumnParallelLinear,
                    linear_proj=row_parallel,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=mlp_spec(row_parallel),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def vision_layer_spec() -> ModuleSpec:
    """The vision tower's layer: pre-norm, bidirectional attention, MLP."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=BidirectionalAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=mlp_spec(),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_submodules(layer: ModuleSpec, num_layers: int) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage (or chunk), with the project's norm at the end."""
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=Norm)
