"""SigLIP's vision tower."""

from __future__ import annotations

from dattn_mcore.config.schema import VisionConfig
from tools.checkpoint_convert.mapping import Entry, interleaved, linear, norm

PREFIX = "model.vision_tower."


def shared_table(vision: VisionConfig, positions: int, visual_positions: bool) -> list[Entry]:
    """What SigLIP and CLIP have in common: patches, positions, encoder layers.

    Args:
        vision: the tower's sizes.
        positions: entries of the position embedding.
        visual_positions: False: the Megatron-Core side has none, the Hugging Face side zeros.
    """
    hidden, ffn, patch = vision.hidden_size, vision.ffn_hidden_size, vision.patch_size
    layers = vision.num_layers + vision.select_layer + 1
    ours, theirs = "vision.decoder.layers.", PREFIX + "encoder.layers.{layer}."
    attention = theirs + "self_attn."
    qkv = interleaved(vision.num_attention_heads, 3)
    return [
        Entry(
            "vision.patch_embedding.weight",
            {PREFIX + "embeddings.patch_embedding.weight": (hidden, 3, patch, patch)},
        ),
        Entry(
            "vision.position_embedding.weight" if visual_positions else None,
            {PREFIX + "embeddings.position_embedding.weight": (positions, hidden)},
        ),
        *norm(ours + "input_layernorm", theirs + "layer_norm1", hidden, layers, bias=True),
        *norm(ours + "pre_mlp_layernorm", theirs + "layer_norm2", hidden, layers, bias=True),
        Entry(
            ours + "self_attention.linear_qkv.weight",
            {attention + f"{x}_proj.weight": (hidden, hidden) for x in "qkv"},
            qkv,
            layers,
        ),
        Entry(
            ours + "self_attention.linear_qkv.bias",
            {attention + f"{x}_proj.bias": (hidden,) for x in "qkv"},
            qkv,
            layers,
        ),
        *linear(
            ours + "self_attention.linear_proj", attention + "out_proj", hidden, hidden, layers
        ),
        *linear(ours + "mlp.linear_fc1", theirs + "mlp.fc1", ffn, hidden, layers),
        *linear(ours + "mlp.linear_fc2", theirs + "mlp.fc2", hidden, ffn, layers),
    ]


def table(vision: VisionConfig, visual_positions: bool) -> list[Entry]:
    """The whole tower, up to the selected layer."""
    patches = vision.rows_per_tile
    entries = shared_table(vision, patches, visual_positions)
    entries.append(
        Entry(
            "vision.patch_embedding.bias",
            {PREFIX + "embeddings.patch_embedding.bias": (vision.hidden_size,)},
        )
    )
    if vision.select_layer == -1:
        entries += norm(
            "vision.decoder.final_layernorm",
            PREFIX + "post_layernorm",
            vision.hidden_size,
            bias=True,
        )
    return entries
