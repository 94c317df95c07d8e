"""Parameters of a language model, from its sizes and the features of its family.

Keys stand in the order of Megatron-Core's modules, which lays gradients and optimizer states out in
it. Hugging Face names are those of an export; a family whose names differ gives them.
"""

from __future__ import annotations

from collections.abc import Mapping

from dattn_mcore.architectures.features import TextFeatures
from dattn_mcore.architectures.parameters import COPY, STACKED, Entry, Mix, Shape, norm
from dattn_mcore.architectures.sizes import LlmConfig

PREFIX = "model.language_model."
LAYER, IN_LAYER = "decoder.layers.", f"{PREFIX}layers.{{layer}}."
HEAD = "lm_head.weight"
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


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
        {HEAD: (llm.vocab_size, llm.hidden_size)},
        Mix("padded", rows=llm.padded_vocab_size),
        tp_axis=0,
    )


def _layer(llm: LlmConfig, features: TextFeatures) -> list[Entry]:
    norms, hidden, ffn = features.norms, llm.hidden_size, llm.ffn_hidden_size

    def normed(ours: str, theirs: str | None) -> list[Entry]:
        if theirs is None:
            return []
        return norm(f"{LAYER}{ours}", f"{IN_LAYER}{theirs}", hidden, layers=llm.num_layers)

    return [
        *normed("input_layernorm", norms.attention_input),
        *_attention(llm, features),
        *normed("self_attention.linear_proj.post_norm", norms.attention_output),
        *normed("pre_mlp_layernorm", norms.mlp_input),
        _weight(
            llm,
            "mlp.linear_fc1",
            {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden)},
            mix=STACKED,
        ),
        _weight(llm, "mlp.linear_fc2", {"mlp.down_proj": (hidden, ffn)}, row_parallel=True),
        *normed("mlp.linear_fc2.post_norm", norms.mlp_output),
    ]


def _attention(llm: LlmConfig, features: TextFeatures) -> list[Entry]:
    hidden, layers = llm.hidden_size, llm.num_layers
    query, key = (n * llm.head_dim for n in (llm.num_attention_heads, llm.num_query_groups))
    by_group = Mix("interleaved", groups=llm.num_query_groups)
    q, k, v, o = (f"self_attn.{name}_proj" for name in "qkvo")
    entries = []
    for ours, names, mix in (
        ("linear_q", {q: query}, COPY),
        ("linear_kv", {k: key, v: key}, by_group),
    ):
        parts = {name: (rows, hidden) for name, rows in names.items()}
        entries.append(_weight(llm, f"self_attention.{ours}", parts, mix=mix))
        if features.qkv_bias:
            entries.append(
                Entry(
                    f"{LAYER}self_attention.{ours}.bias",
                    {f"{IN_LAYER}{name}.bias": (rows,) for name, rows in names.items()},
                    mix,
                    layers=layers,
                    tp_axis=0,
                    start="zeros",
                )
            )
    entries.append(
        _weight(llm, "self_attention.linear_proj", {o: (hidden, query)}, row_parallel=True)
    )
    if features.qk_norm:
        for name, heads in (("q", llm.num_attention_heads), ("k", llm.num_query_groups)):
            entries += norm(
                f"{LAYER}self_attention.{name}_layernorm",
                f"{IN_LAYER}self_attn.{name}_norm",
                features.qk_norm_size(heads=heads, head_dim=llm.head_dim),
                layers=layers,
            )
    return entries


def _weight(
    llm: LlmConfig,
    key: str,
    parts: Mapping[str, Shape],
    *,
    mix: Mix = COPY,
    row_parallel: bool = False,
) -> Entry:
    """A linear's weight. A row-parallel one feeds the residual stream."""
    return Entry(
        f"{LAYER}{key}.weight",
        {f"{IN_LAYER}{name}.weight": shape for name, shape in parts.items()},
        mix,
        layers=llm.num_layers,
        tp_axis=1 if row_parallel else 0,
        start="residual" if row_parallel else "normal",
    )
