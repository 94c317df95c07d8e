"""SigLIP, and the towers of fixed size of SigLIP 2, which are the same with other weights.

Source: `SiglipVisionConfig`, `modeling_siglip` and `SiglipImageProcessor` of transformers.
"""

from __future__ import annotations

from dattn_mcore.architectures.features import TowerFeatures
from dattn_mcore.architectures.records import Tower

ARCHITECTURE = Tower(
    name="siglip",
    title="SigLIP",
    model_type="siglip_vision_model",
    folder_types=("siglip", "siglip_vision_model"),
    features=TowerFeatures(),
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    to_hf={"vision_use_head": False},  # the head pools rows, which nobody reads here
)
