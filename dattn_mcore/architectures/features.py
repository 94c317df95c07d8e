"""What all models of a family have in common, as the layers ask for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

HeadAxis = Literal["heads", "head_dim"]


@dataclass(frozen=True)
class LayerNorms:
    """Norms of a layer over the residual stream's width, by their place.

    Each has its name in Hugging Face's layer, `...norm`; None: there is no norm at that place.

    Attributes:
        attention_input: of the rows that enter attention.
        attention_output: of what attention gives, before the residual is added.
        mlp_input: of the rows that enter the MLP.
        mlp_output: of what the MLP gives, before the residual is added.
    """

    attention_input: str | None = None
    attention_output: str | None = None
    mlp_input: str | None = None
    mlp_output: str | None = None

    @property
    def number(self) -> int:
        """How many a layer has."""
        places = (self.attention_input, self.attention_output, self.mlp_input, self.mlp_output)
        return sum(name is not None for name in places)


# Before each branch; and also after it.
PRE_NORMS = LayerNorms(
    attention_input="input_layernorm",
    mlp_input="post_attention_layernorm",
)
SANDWICH_NORMS = LayerNorms(
    attention_input="input_layernorm",
    attention_output="post_attention_layernorm",
    mlp_input="pre_feedforward_layernorm",
    mlp_output="post_feedforward_layernorm",
)


@dataclass(frozen=True)
class TextFeatures:
    """How the layers of a language model differ from those of other families.

    Attributes:
        activation: of the gated MLP: `silu` (SwiGLU) or `gelu_tanh` (GeGLU).
        norms: where a layer has norms.
        zero_centered_gamma: norms scale by 1 + weight.
        scale_embeddings: rows enter the stack times sqrt(hidden_size).
        qkv_bias: queries, keys and values have a bias; the output projection has none.
        qk_norm: axes of queries and keys [rows, heads, head_dim] that are normed together, by one
            weight of their size, before they are rotated; those of text that looks at visual rows,
            and of these, as well. Empty: they are not normed.
    """

    activation: Literal["silu", "gelu_tanh"] = "silu"
    norms: LayerNorms = PRE_NORMS
    zero_centered_gamma: bool = False
    scale_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: tuple[HeadAxis, ...] = ()

    def qk_norm_size(self, *, heads: int, head_dim: int) -> int:
        """Numbers of a row's queries, or keys, of so many heads that are normed together."""
        sizes = {"heads": heads, "head_dim": head_dim}
        return math.prod(sizes[axis] for axis in self.qk_norm)


@dataclass(frozen=True)
class TowerFeatures:
    """How vision towers differ.

    Attributes:
        normalization: of all its norms: LayerNorm, which has a bias, or RMSNorm, which has none.
        class_row: a learned row stands in front of the patches; its features are dropped.
        patch_bias: the patch embedding has a bias.
        patch_norm: patches are normed before their positions are added.
        pre_norm: rows are normed before the first layer.
        final_norm: rows are normed after the last layer, where all layers are run.
        gated_mlp: the MLP's first linear is two, and the activation of one gates the other.
        linear_bias: all linears of a layer have biases, or none has.
    """

    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    class_row: bool = False
    patch_bias: bool = True
    patch_norm: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    gated_mlp: bool = False
    linear_bias: bool = True

    @property
    def mlp_products(self) -> int:
        """Products of hidden_size by ffn_hidden_size in one layer's MLP."""
        return 3 if self.gated_mlp else 2
