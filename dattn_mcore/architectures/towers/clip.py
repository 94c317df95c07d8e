"""CLIP: a class row, a norm in front of the layers, and none behind them.

Source: `CLIPVisionConfig`, `modeling_clip` and `CLIPImageProcessor` of transformers; its last norm
is for the pooled class row alone.
"""

from __future__ import annotations

from dattn_mcore.architectures.features import TowerFeatures
from dattn_mcore.architectures.records import Tower

FEATURES = TowerFeatures(class_row=True, patch_bias=False, pre_norm=True, final_norm=False)
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
ARCHITECTURE = Tower(
    name="clip",
    title="CLIP",
    model_type="clip_vision_model",
    folder_types=("clip", "clip_vision_model"),
    features=FEATURES,
    image_mean=IMAGE_MEAN,
    image_std=IMAGE_STD,
)
