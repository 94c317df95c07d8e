"""AIMv2 of fixed size: RMS norms, gated MLPs, no biases but the patches', which are normed.

Source: `Aimv2VisionConfig` and `modeling_aimv2` of transformers; its pixels are CLIP's. Towers of
native resolution, whose positions are sinusoids, are not among these.
"""

from __future__ import annotations

from dattn_mcore.architectures.encoder import TowerNames
from dattn_mcore.architectures.features import TowerFeatures
from dattn_mcore.architectures.records import Tower
from dattn_mcore.architectures.towers.clip import IMAGE_MEAN, IMAGE_STD

FEATURES = TowerFeatures(
    normalization="RMSNorm", patch_norm=True, gated_mlp=True, linear_bias=False
)
NAMES = TowerNames(
    patches="embeddings.patch_embed",
    patch_norm="embeddings.rms_norm",
    attention_norm="rms_norm1",
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    attention_out="attention.out_proj",
    mlp_norm="rms_norm2",
    mlp_in=("ffn.gate_proj", "ffn.up_proj"),
    mlp_out="ffn.down_proj",
    final_norm="rms_norm",
)
ARCHITECTURE = Tower(
    name="aimv2",
    title="AIMv2",
    model_type="aimv2_vision_model",
    folder_types=("aimv2", "aimv2_vision_model"),
    features=FEATURES,
    image_mean=IMAGE_MEAN,
    image_std=IMAGE_STD,
    names=NAMES,
    norm_eps="rms_norm_eps",
    to_hf={"use_head": False},  # the head pools rows, which nobody reads here
    stated={"qkv_bias": False, "mlp_bias": False, "is_native": False},
)
