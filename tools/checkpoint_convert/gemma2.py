"""Gemma 2: Mistral's table with four norms a layer. Gammas are zero-centred on both sides."""

from __future__ import annotations

from dattn_mcore.config.schema import LlmConfig
from tools.checkpoint_convert.mapping import Entry, norm
from tools.checkpoint_convert.mistral import PREFIX, shared_table

NORMS = {
    "pre_mlp_layernorm": "pre_feedforward_layernorm",
    "self_attention.linear_proj.post_norm": "post_attention_layernorm",
    "mlp.linear_fc2.post_norm": "post_feedforward_layernorm",
}


def table(llm: LlmConfig) -> list[Entry]:
    """The whole language model."""
    entries = shared_table(llm)
    for ours, theirs in NORMS.items():
        entries += norm(
            "decoder.layers." + ours,
            PREFIX + "layers.{layer}." + theirs,
            llm.hidden_size,
            llm.num_layers,
        )
    return entries
