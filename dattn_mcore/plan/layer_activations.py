"""Bytes that a layer of the language model keeps between forward and backward.

By the layer's own code, and held against what autograd keeps of it (`training.rehearse`).
"""

from __future__ import annotations

from dattn_mcore.architectures import text_features
from dattn_mcore.config.checks import shards_of
from dattn_mcore.config.lora import adapters_of
from dattn_mcore.config.schema import Config
from dattn_mcore.plan.adapter_activations import adapter_bytes
from dattn_mcore.plan.backward import DECODER, FC1, FC2, FIRST, PROJ, decoder_gradients
from dattn_mcore.plan.context import gathered_bytes, rings
from dattn_mcore.plan.flops import folds, visual_ends
from dattn_mcore.plan.rows import Rows


def layer_bytes(config: Config, pack: Rows, fp8: bool, layer: int) -> float:
    """Bytes kept by layer 0, 1, ... for one micro-batch, computed once.

    Args:
        config: a checked configuration.
        pack: rows of the micro-batch.
        fp8: linears in FP8.
        layer: number in the whole model.
    """
    gradients = decoder_gradients(config)[layer]
    if not gradients.any:
        return 0.0
    # What enters an adapted linear is read by its A.
    read = gradients.weights if adapters_of(config) is None else _all_linears()
    kept = _norm_bytes(config, pack, layer) + _attention_bytes(config, pack)
    kept += _input_bytes(config, pack, fp8, layer, read)
    if "mlp" not in _modules_again(config):
        llm = config.model.llm
        width = llm.ffn_hidden_size / config.parallel.tp * _rows_after(config, pack, layer)
        kept += 2 * _element(config) * width  # the first linear's output
        kept += (1 if fp8 else _element(config)) * width * (FC2 in read)
    return kept + adapter_bytes(config, pack)


def _element(config: Config) -> int:
    return 2 if config.train.precision == "bf16" else 4


def _all_linears() -> frozenset[str]:
    return frozenset((*FIRST[DECODER], PROJ, FC1, FC2))


def _modules_again(config: Config) -> tuple[str, ...]:
    train = config.train
    return train.recompute_modules if train.recompute == "selective" else ()


def _rows_after(config: Config, pack: Rows, layer: int) -> float:
    """Rows that go on after a layer's keys and values."""
    return pack.text + (0 if visual_ends(config, layer) else pack.visual)


def _norm_bytes(config: Config, pack: Rows, layer: int) -> float:
    """Norms keep their input in float32."""
    llm, features = config.model.llm, text_features(config.model)
    shards = shards_of(config).tensor
    after = _rows_after(config, pack, layer)
    at_input = features.norms.attention_input is not None
    rows = at_input * (pack.text + pack.visual) + (features.norms.number - at_input) * after
    kept = 4 * llm.hidden_size * rows / shards
    if features.qk_norm:
        query, keys = _widths(config)
        kept += 4 * (_asking(config, pack) * query + (pack.text + pack.visual) * keys)
    return kept


def _widths(config: Config) -> tuple[float, float]:
    """Numbers of a row's queries and of its keys (as many as its values) on a rank."""
    llm, tp = config.model.llm, config.parallel.tp
    return llm.num_attention_heads * llm.head_dim / tp, llm.groups_per_rank(tp) * llm.head_dim


def _asking(config: Config, pack: Rows) -> float:
    return pack.text + (pack.visual if config.attention.v2v == "causal" else 0)


def _attention_bytes(config: Config, pack: Rows) -> float:
    """Queries, keys, values, output and log-sum-exp.

    The calls of `flash` and `sdpa` keep what was rotated as well, and cosines and sines; `triton`
    rotates again.
    """
    if config.parallel.cp > 1 and not rings(config):
        return _attention_bytes_in_context(config, pack)
    e, (query, keys) = _element(config), _widths(config)
    rows, asking = pack.text + pack.visual, _asking(config, pack)
    kept = (
        e * (2 * asking * query + 2 * rows * keys) + 4 * asking * query / config.model.llm.head_dim
    )
    if text_features(config.model).qk_norm:
        kept += e * rows * keys  # values are a part of what the linear gave, which stays whole
    if config.attention.backend == "triton" or "core_attn" in _modules_again(config):
        return kept
    causal = config.attention.v2v == "causal"
    rotated = rows if config.attention.t2v_position == "rope" else pack.text
    if not causal:
        # Text asks visual rows unrotated, and keys are a part of what the linear gave.
        kept += e * rotated * keys
        kept += e * asking * query if config.attention.t2v_position == "none" else 0
    return kept + 2 * e * (asking + rotated) * config.model.llm.head_dim


def _attention_bytes_in_context(config: Config, own: Rows) -> float:
    """Of a context parallel rank: own rotated queries, output and log-sum-exp, visual keys, values.

    And what it gathered, in the place of own queries, keys and values of text, but that these are
    parts of what a linear gave together with visual ones.
    """
    e, (query, keys) = _element(config), _widths(config)
    rows, text = own.text + own.visual, own.text
    kept = e * (2 * text * query + 2 * rows * keys)
    kept += 4 * text * query / config.model.llm.head_dim
    if text_features(config.model).qk_norm:
        kept += e * own.visual * keys
    if "core_attn" in _modules_again(config):
        return kept
    rotated = own.text
    if config.attention.t2v_position == "rope":
        kept += e * own.visual * keys
        rotated = rows
    kept += gathered_bytes(config, own)
    return kept + 2 * e * (text + rotated) * config.model.llm.head_dim


def _input_bytes(config: Config, pack: Rows, fp8: bool, layer: int, read: frozenset[str]) -> float:
    """What enters the linears whose weight learns."""
    h = config.model.llm.hidden_size
    e, (query, keys) = _element(config), _widths(config)
    gemm_input = 1 if fp8 else e
    shards = shards_of(config).tensor
    rows, after = pack.text + pack.visual, _rows_after(config, pack, layer)
    kept, norms = 0.0, text_features(config.model).norms
    normed_again = "layernorm" in _modules_again(config)
    if not (normed_again and norms.attention_input):
        kept += gemm_input * h * rows / shards * bool(read.intersection(FIRST[DECODER]))
    if not (normed_again and norms.mlp_input):
        kept += gemm_input * h * after / shards * (FC1 in read)
    if PROJ not in read:
        return kept
    visual = after - pack.text
    if fp8:
        return kept + visual * (keys if folds(config) else query) + pack.text * query
    if folds(config) or not visual:  # text rows are the attention's output itself
        return kept + e * visual * keys
    return kept + e * after * query
