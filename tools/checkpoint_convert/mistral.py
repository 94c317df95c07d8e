"""Mistral: embedding, decoder layers, output head."""

from __future__ import annotations

from dattn_mcore.config.schema import LlmConfig
from tools.checkpoint_convert.mapping import (
    Entry,
    interleaved,
    norm,
    padded_rows,
    stacked_rows,
)

PREFIX = "model.language_model."


def shared_table(llm: LlmConfig) -> list[Entry]:
    """What Mistral and Gemma 2 have in common: everything but the norms inside a layer."""
    hidden, layers, ffn = llm.hidden_size, llm.num_layers, llm.ffn_hidden_size
    query = llm.num_attention_heads * llm.head_dim
    groups, key = llm.num_query_groups, llm.num_query_groups * llm.head_dim
    ours, theirs = "decoder.layers.", PREFIX + "layers.{layer}."
    vocab = padded_rows(llm.vocab_size, llm.vocab_pad_multiple)
    entries = [
        Entry(
            "embedding.word_embeddings.weight",
            {PREFIX + "embed_tokens.weight": (llm.vocab_size, hidden)},
            vocab,
        ),
        *norm(ours + "input_layernorm", theirs + "input_layernorm", hidden, layers),
        Entry(
            ours + "self_attention.linear_q.weight",
            {theirs + "self_attn.q_proj.weight": (query, hidden)},
            layers=layers,
        ),
        Entry(
            ours + "self_attention.linear_kv.weight",
            {
                theirs + "self_attn.k_proj.weight": (key, hidden),
                theirs + "self_attn.v_proj.weight": (key, hidden),
            },
            interleaved(groups, 2),
            layers,
        ),
        Entry(
            ours + "self_attention.linear_proj.weight",
            {theirs + "self_attn.o_proj.weight": (hidden, query)},
            layers=layers,
        ),
        Entry(
            ours + "mlp.linear_fc1.weight",
            {
                theirs + "mlp.gate_proj.weight": (ffn, hidden),
                theirs + "mlp.up_proj.weight": (ffn, hidden),
            },
            stacked_rows(ffn, ffn),
            layers,
        ),
        Entry(
            ours + "mlp.linear_fc2.weight",
            {theirs + "mlp.down_proj.weight": (hidden, ffn)},
            layers=layers,
        ),
        *norm("decoder.final_layernorm", PREFIX + "norm", hidden),
    ]
    if not llm.tie_embeddings:
        entries.append(
            Entry("output_layer.weight", {"lm_head.weight": (llm.vocab_size, hidden)}, vocab)
        )
    return entries


def table(llm: LlmConfig) -> list[Entry]:
    """The whole language model."""
    return [
        *shared_table(llm),
        *norm(
            "decoder.layers.pre_mlp_layernorm",
            PREFIX + "layers.{layer}.post_attention_layernorm",
            llm.hidden_size,
            llm.num_layers,
        ),
    ]
