"""Bytes of activations, logits and buffers on a rank: an estimate, where states are exact.

Counted are the tensors that autograd keeps, by the layer's own code: what a linear, a norm (in
float32), an activation and the attention read in their backward passes.
"""

from __future__ import annotations

from dataclasses import dataclass

from dattn_mcore.config.schema import Config
from dattn_mcore.plan.flops import Rows, folds
from dattn_mcore.plan.hardware import LIBRARY_BYTES


@dataclass(frozen=True)
class WorkingMemory:
    """Bytes on a rank, beside its states.

    Attributes:
        activations: kept between forward and backward, of all micro-batches in flight.
        working: of the layer that is being computed, and the tower's.
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
    """Bytes kept by one layer of the language model for one micro-batch, without recompute."""
    llm, tp = config.model.llm, config.parallel.tp
    e = 2 if config.train.precision == "bf16" else 4
    gemm_input = 1 if fp8 else e
    shards = tp if config.parallel.sp else 1
    rows, h = pack.text + pack.visual, llm.hidden_size
    query = llm.num_attention_heads * llm.head_dim / tp
    keys_values = 2 * llm.num_query_groups * llm.head_dim / tp
    asking = rows if config.attention.v2v == "causal" else pack.text
    answered = pack.visual * (keys_values / 2 if folds(config) else query) + pack.text * query
    norms = (4 if llm.post_norms else 2) * 4 * h * rows / shards  # float32 copies
    inputs = gemm_input * (2 * h * rows / shards + answered + llm.ffn_hidden_size / tp * rows)
    attention = e * (asking * query + rows * keys_values)
    gated = 2 * e * llm.ffn_hidden_size / tp * rows
    return norms + inputs + attention + gated


def _tower_bytes(config: Config, pack: Rows) -> tuple[float, float]:
    """Bytes kept by the tower, and those of the layer it computes."""
    vision, tp = config.model.vision, config.parallel.tp
    e = 2 if config.train.precision == "bf16" else 4
    rows = pack.tiles * vision.rows_per_tile
    v, f = vision.hidden_size, vision.ffn_hidden_size
    layer = rows * (8 * v + e * (2 * v + (3 * v + v + 2 * f) / tp))
    layers = vision.num_layers + 1 + vision.select_layer
    kept = layer * layers if "vision" in config.train.trains else e * rows * v
    return kept, layer


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
    shards = tp if config.parallel.sp else 1
    layer = layer_bytes(config, pack, fp8)
    rows = pack.text + pack.visual
    kept = layer
    if config.train.recompute == "full":
        kept = e * llm.hidden_size * rows / shards
    few = config.train.recompute_layers
    short = num_layers if few is None else min(few, num_layers)
    kept_here = kept * short + layer * (num_layers - short)
    activations = kept_here * micro_batches_in_flight(config, stage, num_microbatches)
    gradient = e * 2 * llm.ffn_hidden_size / tp * rows
    working = gradient + (layer if config.train.recompute == "full" else 0.0)
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
