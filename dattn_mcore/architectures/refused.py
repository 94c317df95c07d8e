"""Why a language model or a tower that transformers knows cannot be trained here, for a message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_GATES = "output gates, for which a visual row would need the query that D-Attn does not compute"
_LINEAR = "layers of linear attention, where a row that attends to itself alone has no meaning"
# What no field of a configuration says.
_BY_TYPE = {
    "gpt_oss": "attention sinks, with which a softmax over a row's own key is not 1",
    "qwen3_next": f"{_LINEAR}, and {_GATES}",
    "qwen3_5": f"{_LINEAR}, and {_GATES}",
    "qwen3_5_text": f"{_LINEAR}, and {_GATES}",
    "qwen2_vl": "rotary positions of several axes (M-RoPE)",
    "qwen2_5_vl": "rotary positions of several axes (M-RoPE)",
    "qwen3_vl": "rotary positions of several axes (M-RoPE)",
    "qwen2_5_omni": "rotary positions of several axes (M-RoPE)",
    "qwen3_omni_moe": "rotary positions of several axes (M-RoPE), and experts (MoE)",
}
# Fields that say it, with any value but none and 0.
_BY_FIELD = {
    "num_experts": "experts (MoE)",
    "num_local_experts": "experts (MoE)",
    "n_routed_experts": "experts (MoE)",
    "enable_moe_block": "experts (MoE)",
    "kv_lora_rank": "compressed keys and values (MLA)",
    "attn_output_gate": _GATES,
    "hidden_size_per_layer_input": "embeddings of each layer",
    "num_kv_shared_layers": "layers that share keys and values",
    "attention_k_eq_v": "values that are its keys",
    "global_head_dim": "heads of another size on some layers",
    "per_layer_config": "heads of another size on some layers",
}
_ANY_SIZE = "images of any size and shape (NaFlex), where tiles are squares of one size"
_ROTARY = "rotary positions"
_LAYER_SCALE = "a learned scale of each branch (layer scale)"
_NO_TOWER = "no architecture here describes it"
# The same of towers.
_TOWERS_BY_TYPE = {
    "siglip2": _ANY_SIZE,
    "siglip2_vision_model": _ANY_SIZE,
    "intern_vit_6b": _LAYER_SCALE,  # of the publisher's own code
    "mlcd_vision_model": _ROTARY,
    "pixtral": _ROTARY,
}
_TOWERS_BY_FIELD = {
    "layerscale_value": _LAYER_SCALE,
    "layer_scale_init_value": _LAYER_SCALE,
    "num_register_tokens": "register rows",
    "rope_theta": _ROTARY,
    "use_qk_norm": "norms of heads",
    "spatial_merge_size": "patches that are merged inside it",
}


def why_refused(fields: Mapping[str, Any]) -> str:
    """What the model has that is not built here, from its config.json.

    Args:
        fields: of config.json; those of `text_config` count where there is one.
    """
    kind = fields.get("model_type")
    if isinstance(kind, str) and kind in _BY_TYPE:
        return f"it has {_BY_TYPE[kind]}"
    inner = fields.get("text_config")
    text = inner if isinstance(inner, Mapping) else fields
    types = text.get("layer_types")
    if isinstance(types, list) and any("linear" in str(name) for name in types):
        return f"it has {_LINEAR}"
    for name, reason in _BY_FIELD.items():
        if text.get(name):
            return f"it has {reason}"
    if isinstance(inner, Mapping):
        return "it is a model of images and text; give the folder of a language model"
    return "no architecture here describes it"


def why_tower_refused(fields: Mapping[str, Any]) -> str:
    """What a tower has that is not built here, from its config.json.

    Args:
        fields: of config.json; those of `vision_config` count where there is one.
    """
    inner = fields.get("vision_config")
    tower = inner if isinstance(inner, Mapping) else fields
    types = (fields.get("model_type"), tower.get("model_type"))
    names = [kind for kind in types if isinstance(kind, str)]
    found = [_TOWERS_BY_TYPE[kind] for kind in names if kind in _TOWERS_BY_TYPE]
    found += [reason for name, reason in _TOWERS_BY_FIELD.items() if tower.get(name)]
    return f"it has {', '.join(dict.fromkeys(found))}" if found else _NO_TOWER
