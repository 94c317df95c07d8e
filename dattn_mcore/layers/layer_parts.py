"""The modules that a layer spec is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerParts:
    """Classes by their place; those of `text_` work on the text rows of the last layer alone."""

    norm: Any
    linear_q: Any
    linear_kv: Any
    linear_proj: Any
    linear_proj_post_norm: Any
    linear_fc1: Any
    linear_fc2: Any
    linear_fc2_post_norm: Any
    text_fc1: Any
    text_fc2: Any
    text_fc2_post_norm: Any
    column: Any
    row: Any
    bidirectional_attention: Any
