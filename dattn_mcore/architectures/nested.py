"""Models of images and text whose parts can be taken: language model, tower, projector.

Source: the modeling files of transformers; the first of each pair of names is that of release 5,
which an export has as well, the second what releases before wrote.
"""

from __future__ import annotations

from dattn_mcore.architectures import decoder, parameters

# `model_type` of their folders. Their parts' own stand in `text_config` and `vision_config`.
MODEL_TYPES = ("llava", "llava_next", "gemma3", "mistral3")
# Where names of a part begin.
LANGUAGE = (decoder.PREFIX, "language_model.model.")
TOWER = (parameters.TOWER, "vision_tower.")
PROJECTOR = (parameters.PROJECTOR, "multi_modal_projector.")
HEADS = (decoder.HEAD, f"language_model.{decoder.HEAD}")
# What is no part of these.
OTHERS = ("model.image_newline", "image_newline")


def without_prefix(name: str, prefixes: tuple[str, ...]) -> str | None:
    """The name inside a part; None where it is of another."""
    for prefix in prefixes:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return None
