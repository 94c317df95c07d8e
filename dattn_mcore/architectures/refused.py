"""Why a language model that transformers knows cannot be trained here, for a message."""

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
