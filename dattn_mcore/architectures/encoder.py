"""Parameters of a vision tower, in the order of Megatron-Core's modules."""

from __future__ import annotations

from dataclasses import dataclass

from dattn_mcore.architectures.features import TowerFeatures
from dattn_mcore.architectures.parameters import (
    COPY,
    STACKED,
    TOWER,
    Entry,
    Mix,
    Start,
    linear,
    norm,
)
from dattn_mcore.architectures.sizes import VisionConfig


@dataclass(frozen=True)
class TowerNames:
    """Where transformers keeps a tower's tensors; the defaults are those of SigLIP and CLIP.

    Attributes:
        class_row: `TowerFeatures.class_row`.
        patches: convolution over the pixels.
        patch_norm: `TowerFeatures.patch_norm`; none of these two has one.
        positions: embedding of a row's place.
        pre_norm: `TowerFeatures.pre_norm`; the name is misspelt there.
        layers: list of layers; the names below are within one of them.
        attention_norm: before the attention.
        qkv: queries, keys and values.
        attention_out: last linear of the attention.
        mlp_norm: before the MLP.
        mlp_in: first linear of the MLP; of a gated one the two, that with the activation first.
        mlp_out: last linear of the MLP.
        final_norm: after the last layer, for patches or for a pooled row alone.
    """

    class_row: str = "embeddings.class_embedding"
    patches: str = "embeddings.patch_embedding"
    patch_norm: str = ""
    positions: str = "embeddings.position_embedding"
    pre_norm: str = "pre_layrnorm"
    layers: str = "encoder.layers"
    attention_norm: str = "layer_norm1"
    qkv: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_out: str = "self_attn.out_proj"
    mlp_norm: str = "layer_norm2"
    mlp_in: tuple[str, ...] = ("mlp.fc1",)
    mlp_out: str = "mlp.fc2"
    final_norm: str = "post_layernorm"


def encoder_table(
    vision: VisionConfig, features: TowerFeatures, names: TowerNames, *, visual_positions: bool
) -> list[Entry]:
    """Patches, positions, encoder layers up to the selected one, norms.

    Args:
        vision: the tower's sizes.
        features: what its kind has.
        names: what its kind calls it on the Hugging Face side.
        visual_positions: False: the Megatron-Core side has none, the Hugging Face side zeros.
    """
    hidden, patch = vision.hidden_size, vision.patch_size

    def normed(wanted: bool, ours: str, theirs: str) -> list[Entry]:
        if not wanted:
            return []
        return norm(f"vision.{ours}", TOWER + theirs, hidden, bias=_norm_bias(features))

    entries = []
    if features.class_row:
        entries.append(Entry("vision.class_embedding", {TOWER + names.class_row: (hidden,)}))
    patches = linear(
        "vision.patch_embedding", TOWER + names.patches, (hidden, 3, patch, patch), start="fan_in"
    )
    entries += patches if features.patch_bias else patches[:1]
    entries += normed(features.patch_norm, "patch_norm", names.patch_norm)
    positions = vision.rows_per_tile + features.class_row
    entries.append(
        Entry(
            "vision.position_embedding.weight" if visual_positions else None,
            {f"{TOWER}{names.positions}.weight": (positions, hidden)},
        )
    )
    entries += normed(features.pre_norm, "pre_layernorm", names.pre_norm)
    entries += _layer(vision, features, names)
    last = features.final_norm and vision.select_layer == -1
    return entries + normed(last, "decoder.final_layernorm", names.final_norm)


def _norm_bias(features: TowerFeatures) -> bool:
    return features.normalization == "LayerNorm"


def _layer(vision: VisionConfig, features: TowerFeatures, names: TowerNames) -> list[Entry]:
    hidden, ffn, layers = vision.hidden_size, vision.ffn_hidden_size, vision.layers_run
    ours, theirs = "vision.decoder.layers.", f"{TOWER}{names.layers}.{{layer}}."
    by_head = Mix("interleaved", groups=vision.num_attention_heads)

    def normed(key: str, name: str) -> list[Entry]:
        bias = _norm_bias(features)
        return norm(f"{ours}{key}", f"{theirs}{name}", hidden, layers=layers, bias=bias)

    def joined(
        key: str,
        parts: tuple[str, ...],
        shape: tuple[int, int],
        *,
        mix: Mix = COPY,
        tp_axis: int = 0,
        start: Start = "normal",
    ) -> list[Entry]:
        """Weight and, where there are any, bias of a linear made of parts of one shape."""
        weight = Entry(
            f"{ours}{key}.weight",
            {f"{theirs}{part}.weight": shape for part in parts},
            mix,
            layers=layers,
            tp_axis=tp_axis,
            start=start,
        )
        bias = Entry(
            f"{ours}{key}.bias",
            {f"{theirs}{part}.bias": shape[:1] for part in parts},
            mix,
            layers=layers,
            tp_axis=0 if tp_axis == 0 else None,
            start="zeros",
        )
        return [weight, bias] if features.linear_bias else [weight]

    square, output, fc2 = (hidden, hidden), (names.attention_out,), (names.mlp_out,)
    stacked = STACKED if features.gated_mlp else COPY
    return [
        *normed("input_layernorm", names.attention_norm),
        *joined("self_attention.linear_proj", output, square, tp_axis=1, start="residual"),
        *joined("self_attention.linear_qkv", names.qkv, square, mix=by_head),
        *normed("pre_mlp_layernorm", names.mlp_norm),
        *joined("mlp.linear_fc1", names.mlp_in, (ffn, hidden), mix=stacked),
        *joined("mlp.linear_fc2", fc2, (hidden, ffn), tp_axis=1, start="residual"),
    ]
