"""Parameters of a vision tower, in the order of Megatron-Core's modules."""

from __future__ import annotations

from dattn_mcore.architectures.features import TowerFeatures
from dattn_mcore.architectures.parameters import TOWER, Entry, Mix, linear, norm
from dattn_mcore.architectures.sizes import VisionConfig


def encoder_table(
    vision: VisionConfig, features: TowerFeatures, visual_positions: bool
) -> list[Entry]:
    """Patches, positions, encoder layers up to the selected one, norms.

    Args:
        vision: the tower's sizes.
        features: what its kind has.
        visual_positions: False: the Megatron-Core side has none, the Hugging Face side zeros.
    """
    hidden, patch = vision.hidden_size, vision.patch_size
    embeddings = f"{TOWER}embeddings."
    entries = []
    if features.class_row:
        entries.append(Entry("vision.class_embedding", {f"{embeddings}class_embedding": (hidden,)}))
    patches = linear(
        "vision.patch_embedding",
        f"{embeddings}patch_embedding",
        (hidden, 3, patch, patch),
        start="fan_in",
    )
    entries += patches if features.patch_bias else patches[:1]
    positions = vision.rows_per_tile + features.class_row
    entries.append(
        Entry(
            "vision.position_embedding.weight" if visual_positions else None,
            {f"{embeddings}position_embedding.weight": (positions, hidden)},
        )
    )
    if features.pre_norm:
        # The name is misspelt on the Hugging Face side.
        entries += norm("vision.pre_layernorm", f"{TOWER}pre_layrnorm", hidden, bias=True)
    entries += _layer(vision)
    if features.final_norm and vision.select_layer == -1:
        entries += norm(
            "vision.decoder.final_layernorm", f"{TOWER}post_layernorm", hidden, bias=True
        )
    return entries


def _layer(vision: VisionConfig) -> list[Entry]:
    hidden, ffn, layers = vision.hidden_size, vision.ffn_hidden_size, vision.layers_run
    ours, theirs = "vision.decoder.layers.", f"{TOWER}encoder.layers.{{layer}}."
    by_head = Mix("interleaved", groups=vision.num_attention_heads)
    qkv = [f"{theirs}self_attn.{name}_proj" for name in "qkv"]
    return [
        *norm(f"{ours}input_layernorm", f"{theirs}layer_norm1", hidden, layers=layers, bias=True),
        *linear(
            f"{ours}self_attention.linear_proj",
            f"{theirs}self_attn.out_proj",
            (hidden, hidden),
            layers=layers,
            tp_axis=1,
            start="residual",
        ),
        Entry(
            f"{ours}self_attention.linear_qkv.weight",
            {f"{name}.weight": (hidden, hidden) for name in qkv},
            by_head,
            layers=layers,
            tp_axis=0,
        ),
        Entry(
            f"{ours}self_attention.linear_qkv.bias",
            {f"{name}.bias": (hidden,) for name in qkv},
            by_head,
            layers=layers,
            tp_axis=0,
            start="zeros",
        ),
        *norm(f"{ours}pre_mlp_layernorm", f"{theirs}layer_norm2", hidden, layers=layers, bias=True),
        *linear(
            f"{ours}mlp.linear_fc1", f"{theirs}mlp.fc1", (ffn, hidden), layers=layers, tp_axis=0
        ),
        *linear(
            f"{ours}mlp.linear_fc2",
            f"{theirs}mlp.fc2",
            (hidden, ffn),
            layers=layers,
            tp_axis=1,
            start="residual",
        ),
    ]
