"""What all models of a family have in common, as the layers ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TextFeatures:
    """How the layers of a language model differ from those of other families.

    Attributes:
        activation: of the gated MLP: `silu` (SwiGLU) or `gelu_tanh` (GeGLU).
        norms: `pre`: a norm before each branch; `sandwich`: and one after it, before the residual.
        zero_centered_gamma: norms scale by 1 + weight.
        scale_embeddings: rows enter the stack times sqrt(hidden_size).
        qkv_bias: queries, keys and values have a bias; the output projection has none.
        qk_norm: each head's queries and keys are normed before they are rotated, by one weight of
            the head's size; those of text that looks at visual rows, and of these, as well.
    """

    activation: Literal["silu", "gelu_tanh"] = "silu"
    norms: Literal["pre", "sandwich"] = "pre"
    zero_centered_gamma: bool = False
    scale_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def norms_per_layer(self) -> int:
        """Norms over the residual's width in one layer."""
        return 4 if self.norms == "sandwich" else 2


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
