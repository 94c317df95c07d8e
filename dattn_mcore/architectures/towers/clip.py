"""CLIP: a class row, a norm in front of the layers, and none behind them.

Source: `CLIPVisionConfig` and `modeling_clip` of transformers; its last norm is for the pooled
class row alone.
"""

from __future__ import annotations

from dattn_mcore.architectures.features import TowerFeatures
from dattn_mcore.architectures.records import Tower

FEATURES = TowerFeatures(class_row=True, patch_bias=False, pre_norm=True, final_norm=False)
ARCHITECTURE = Tower(
    name="clip",
    title="CLIP",
    model_type="clip_vision_model",
    folder_types=("clip", "clip_vision_model"),
    features=FEATURES,
)
