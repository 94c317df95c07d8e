"""Bytes of activations, logits and buffers on a rank: an estimate, where states are exact.

Counted are the tensors that autograd keeps, by the layer's own code: what a linear, a norm (in
float32), an activation and the attention read in their backward passes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dattn_mcore.architectures import text_features, tower_features
from dattn_mcore.config.schema import Config
from dattn_mcore.plan.adapter_activations import adapter_bytes
from dattn_mcore.plan.backward import decoder_gradients, tower_gradients
from dattn_mcore.plan.flops import folds
from dattn_mcore.plan.hardware import LIBRARY_BYTES
from dattn_mcore.plan.rows import Rows


@dataclass(frozen=True)
class WorkingMemory:
    """Bytes on a rank, beside its states.

    Attributes:
        activations: kept between forward and backward, of all micro-batches in flight.
        working: of the MLP or the attention of the layer that is being computed, or of the tower's.
        logits: of the rows whose loss is computed at once.
        fp8_weights: copies of linear weights in FP8, both ways round.
        buffers: pixels, communication, libraries (an allowance).
    """

    activations: float
    working: float
    logits: float
    fp8_weights: float
    buffers: float


def micro_batches_in_flight(config: Config, stage: int, num_microbatches: int) -> float:
    """Micro-batches whose activations of a whole stage are held at once (1F1B, interleaved)."""
    pp, vpp = config.parallel.pp, config.parallel.vpp
    if vpp == 1:
        return min(num_microbatches, pp - stage)
    chunks = min((pp - stage - 1) * 2 + (vpp - 1) * pp + 1, num_microbatches * vpp)
    return chunks / vpp


def layer_bytes(config: Config, pack: Rows, fp8: bool) -> float:
    """Bytes kept by one layer of the language model for one micro-batch, no layer recomputed."""
    llm, tp = config.model.llm, config.parallel.tp
    e = 2 if config.train.precision == "bf16" else 4
    gemm_input = 1 if fp8 else e
    shards = tp if config.parallel.sp else 1
    rows, h = pack.text + pack.visual, llm.hidden_size
    query = llm.num_attention_heads * llm.head_dim / tp
    keys_values = 2 * llm.groups_per_rank(tp) * llm.head_dim
    asking = rows if config.attention.v2v == "causal" else pack.text
    answered = pack.visual * (keys_values / 2 if folds(config) else query) + pack.text * query
    selective = config.train.recompute == "selective"
    again = config.train.recompute_modules if selective else ()
    kept = (
        text_features(config.model).norms_per_layer * 4 * h * rows / shards
    )  # what norms read, in float32
    kept += gemm_input * answered + e * (asking * query + rows * keys_values)
    if "layernorm" not in again:
        kept += gemm_input * 2 * h * rows / shards
    if "mlp" not in again:
        kept += (gemm_input + 2 * e) * llm.ffn_hidden_size / tp * rows  # second linear, gate
    return kept + adapter_bytes(config, pack)


def attention_bytes(config: Config, pack: Rows) -> float:
    """Bytes with which a layer's attention works in backward, beside what it kept.

    However images and text are interleaved: `flash` and `sdpa` sum the gradients of visual keys and
    values, and of the queries that read them, in float32 over passes that copy at most half of
    the rows (`layers.attention.rows`). The joint kernel of `triton` copies none. The score matrices
    of `reference` are not counted.

    Args:
        config: a checked configuration.
        pack: rows of the micro-batch.
    """
    llm, tp = config.model.llm, config.parallel.tp
    e = 2 if config.train.precision == "bf16" else 4
    query = llm.num_attention_heads * llm.head_dim / tp
    keys_values = 2 * llm.groups_per_rank(tp) * llm.head_dim
    asking = pack.text + (pack.visual if config.attention.v2v == "causal" else 0)
    if config.attention.backend == "triton":
        return e * keys_values * pack.visual + (8 + 3 * e) * query * asking
    # Sums; of a pass the keys, values and their gradients, and one of the sums' rows.
    visual = 4 + e + 1
    # Gradients of outputs and queries, the sum; of a pass queries, outputs and gradients, and the
    # sum's rows.
    text = 2 * e + 4 + 2 * e + 2
    return visual * keys_values * pack.visual + text * query * asking


def stage_bytes(config: Config, num_layers: int, pack: Rows, fp8: bool) -> tuple[float, float]:
    """Bytes of a stage's layers for one micro-batch.

    Args:
        config: a checked configuration.
        num_layers: layers of the language model in the stage.
        pack: rows of the micro-batch.
        fp8: linears in FP8.

    Returns:
        What is kept until backward, and what backward needs beside it while it computes again.
    """
    llm, train, tp = config.model.llm, config.train, config.parallel.tp
    e = 2 if train.precision == "bf16" else 4
    entered = e * llm.hidden_size / (tp if config.parallel.sp else 1)  # of a row, into a layer
    if train.recompute_visual_chunk is not None:
        # Visual rows go alone: kept are those that entered the stage, and keys and values.
        keys_values = e * 2 * llm.groups_per_rank(tp) * llm.head_dim
        visual_kept = pack.visual * (entered + num_layers * keys_values)
        chunk = dataclasses.replace(
            pack, text=0, visual=min(train.recompute_visual_chunk, pack.visual)
        )
        layer = layer_bytes(config, chunk, fp8)
        full = train.recompute == "full"
        at_work = num_layers * entered * chunk.visual + layer if full else num_layers * layer
        kept, beside = stage_bytes(_without_chunks(config), num_layers, _text_alone(pack), fp8)
        return kept + visual_kept, max(beside, at_work)
    layer = layer_bytes(config, pack, fp8)
    if train.recompute != "full":
        return num_layers * layer, 0.0
    few = train.recompute_layers
    short = num_layers if few is None else min(few, num_layers)
    rows = pack.text + pack.visual
    return short * entered * rows + (num_layers - short) * layer, layer


def _without_chunks(config: Config) -> Config:
    train = dataclasses.replace(config.train, recompute_visual_chunk=None)
    return dataclasses.replace(config, train=train)


def _text_alone(pack: Rows) -> Rows:
    return dataclasses.replace(pack, visual=0)


def _tower_bytes(config: Config, pack: Rows) -> tuple[float, float]:
    """Bytes kept by the tower, and those of the layer it computes."""
    vision, tp = config.model.vision, config.parallel.tp
    e = 2 if config.train.precision == "bf16" else 4
    rows = pack.tiles * vision.rows_per_tile
    v, f = vision.hidden_size, vision.ffn_hidden_size
    mlp = tower_features(config.model).mlp_products * f  # read by activation and second linear
    layer = rows * (8 * v + e * (2 * v + (3 * v + v + mlp) / tp))
    kept = layer * sum(gradients.any for gradients in tower_gradients(config))
    return kept or e * rows * v, layer


def working_memory(
    config: Config, stage: int, num_layers: int, pack: Rows, num_microbatches: int, fp8: bool
) -> WorkingMemory:
    """Activations and buffers of a rank of a stage.

    Args:
        config: a checked configuration.
        stage: pipeline stage.
        num_layers: layers of the language model in the stage.
        pack: rows of an average micro-batch.
        num_microbatches: of a replica.
        fp8: linears in FP8.
    """
    llm, tp = config.model.llm, config.parallel.tp
    e = 2 if config.train.precision == "bf16" else 4
    frozen = 0 if stage else sum(not gradients.any for gradients in decoder_gradients(config))
    kept, beside = stage_bytes(config, max(num_layers - frozen, 0), pack, fp8)
    activations = kept * micro_batches_in_flight(config, stage, num_microbatches)
    at_once = pack.text + min(pack.visual, config.train.recompute_visual_chunk or pack.visual)
    mlp = e * 2 * llm.ffn_hidden_size / tp * at_once
    working = max(mlp, attention_bytes(config, pack)) + beside  # one after the other
    buffers = LIBRARY_BYTES
    logits = 0.0
    if stage == 0:
        tower_kept, tower_layer = _tower_bytes(config, pack)
        activations += tower_kept
        working = max(working, tower_layer)
        buffers += 2 * 3 * config.model.vision.image_size**2 * pack.tiles
    if stage == config.parallel.pp - 1:
        at_once = min(pack.labelled, config.train.loss_chunk)
        # bf16 logits, float32 logits, exponentials and gradient
        logits = at_once * llm.padded_vocab_size / tp * (e + 3 * 4)
    linears = llm.hidden_size * (
        2 * llm.num_attention_heads * llm.head_dim
        + 2 * llm.num_query_groups * llm.head_dim
        + 3 * llm.ffn_hidden_size
    )
    copies = 2.0 * linears / tp * num_layers if fp8 else 0.0
    return WorkingMemory(activations, working, logits, copies, buffers)
