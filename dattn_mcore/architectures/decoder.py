"""Parameters of a language model, from its sizes and the features of its family.

Keys stand in the order of Megatron-Core's modules, which lays gradients and optimizer states out in
it. Hugging Face names are those of an export; a family whose names differ gives them.
"""

from __future__ import annotations

from collections.abc import Mapping

from dattn_mcore.architectures.features import TextFeatures
from dattn_mcore.architectures.parameters import STACKED, Entry, Mix, Shape, norm
from dattn_mcore.architectures.sizes import LlmConfig

PREFIX = "model.language_model."
LAYER = "decoder.layers."
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
# Norms of a layer: Megatron-Core key to Hugging Face name. Before each branch, or also after it.
PRE_NORMS = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
}
SANDWICH_NORMS = {
    "input_layernorm": "input_layernorm",
    "self_attention.linear_proj.post_norm": "post_attention_layernorm",
    "pre_mlp_layernorm": "pre_feedforward_layernorm",
    "mlp.linear_fc2.post_norm": "post_feedforward_layernorm",
}


def decoder_table(llm: LlmConfig, features: TextFeatures) -> list[Entry]:
    """Embedding, decoder layers, last norm and, where it is a weight of its own, output layer."""
    hidden = llm.hidden_size
    vocabulary = Mix("padded", rows=llm.padded_vocab_size)
    entries = [
        Entry(
            EMBEDDING,
            {f"{PREFIX}embed_tokens.weight": (llm.vocab_size, hidden)},
            vocabulary,
            tp_axis=0,
        ),
        *_layer(llm, features),
        *norm("decoder.final_layernorm", f"{PREFIX}norm", hidden),
    ]
    if not llm.tie_embeddings:
        entries.append(output_layer(llm))
    return entries


def output_layer(llm: LlmConfig) -> Entry:
    """The output layer's weight. Tied to the embedding it is that, or a copy on the last stage."""
    return Entry(
        OUTPUT,
        {"lm_head.weight": (llm.vocab_size, llm.hidden_size)},
        Mix("padded", rows=llm.padded_vocab_size),
        tp_axis=0,
    )


def _layer(llm: LlmConfig, features: TextFeatures) -> list[Entry]:
    norms = SANDWICH_NORMS if features.norms == "sandwich" else PRE_NORMS
    hidden, ffn = llm.hidden_size, llm.ffn_hidden_size
    query, key = (n * llm.head_dim for n in (llm.num_attention_heads, llm.num_query_groups))
    by_group = Mix("interleaved", groups=llm.num_query_groups)

    def weight(key: str, names: Mapping[str, Shape], axis: int, mix: Mix = Mix()) -> Entry:  # noqa: B008 (frozen)
        parts = {f"{PREFIX}layers.{{layer}}.{name}.weight": shape for name, shape in names.items()}
        start = "residual" if axis == 1 else "normal"  # row parallel: into the residual stream
        return Entry(
            f"{LAYER}{key}.weight", parts, mix, layers=llm.num_layers, tp_axis=axis, start=start
        )

    def normed(place: str) -> list[Entry]:
        if place not in norms:
            return []
        name = f"{PREFIX}layers.{{layer}}.{norms[place]}"
        return norm(f"{LAYER}{place}", name, hidden, layers=llm.num_layers)

    attention = "self_attn."
    return [
        *normed("input_layernorm"),
        weight("self_attention.linear_q", {f"{attention}q_proj": (query, hidden)}, 0),
        weight(
            "self_attention.linear_kv",
            {f"{attention}k_proj": (key, hidden), f"{attention}v_proj": (key, hidden)},
            0,
            by_group,
        ),
        weight("self_attention.linear_proj", {f"{attention}o_proj": (hidden, query)}, 1),
        *normed("self_attention.linear_proj.post_norm"),
        *normed("pre_mlp_layernorm"),
        weight(
            "mlp.linear_fc1",
            {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden)},
            0,
            STACKED,
        ),
        weight("mlp.linear_fc2", {"mlp.down_proj": (hidden, ffn)}, 1),
        *normed("mlp.linear_fc2.post_norm"),
    ]
