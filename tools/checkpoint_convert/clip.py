"""CLIP's vision tower: SigLIP's table with a class row and a norm in front, without last norm."""

from __future__ import annotations

from dattn_mcore.config.schema import VisionConfig
from tools.checkpoint_convert.mapping import Entry, norm
from tools.checkpoint_convert.siglip import PREFIX, shared_table


def table(vision: VisionConfig, visual_positions: bool) -> list[Entry]:
    """The whole tower, up to the selected layer."""
    patches = vision.rows_per_tile
    return [
        *shared_table(vision, patches + 1, visual_positions),
        Entry(
            "vision.class_embedding",
            {PREFIX + "embeddings.class_embedding": (vision.hidden_size,)},
        ),
        *norm("vision.pre_layernorm", PREFIX + "pre_layrnorm", vision.hidden_size, bias=True),
    ]
