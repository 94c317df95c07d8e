"""Models of images and text whose parts can be taken: language model, tower, projector.

Source: the modeling files of transformers; the first of each pair of names is that of release 5,
the second what releases before wrote.
"""

from __future__ import annotations

# `model_type` of their folders. Their parts' own stand in `text_config` and `vision_config`.
MODEL_TYPES = ("llava", "llava_next", "gemma3")
# Where names of a part begin.
LANGUAGE = ("model.language_model.", "language_model.model.")
TOWER = ("model.vision_tower.", "vision_tower.")
PROJECTOR = ("model.multi_modal_projector.", "multi_modal_projector.")
HEADS = ("lm_head.weight", "language_model.lm_head.weight")
# What is no part of these.
OTHERS = ("model.image_newline", "image_newline")


def without_prefix(name: str, prefixes: tuple[str, ...]) -> str | None:
    """The name inside a part; None where it is of another."""
    for prefix in prefixes:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return None
