"""Bytes of activations, logits and buffers on a rank: an estimate, where states are exact.

Counted are the tensors that autograd keeps, by the layer's own code: what a linear, a norm (in
float32), an activation and the attention read in their backward passes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dattn_mcore.architectures import tower_features
from dattn_mcore.config.checks import shards_of
from dattn_mcore.config.schema import Config
from dattn_mcore.plan.backward import (
    decoder_gradients,
    learning_outside,
    learns_before_layers,
    tower_gradients,
)
from dattn_mcore.plan.context import gathered_bytes_at_work, tower_ranks
from dattn_mcore.plan.flops import recomputed_layers
from dattn_mcore.plan.hardware import LIBRARY_BYTES
from dattn_mcore.plan.layer_activations import layer_bytes
from dattn_mcore.plan.parameters import layers_of_stage
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


def attention_bytes(config: Config, pack: Rows) -> float:
    """Bytes with which a layer's attention works in backward, beside what it kept.

    However images and text are interleaved: `flash` and `sdpa` sum the gradients of visual keys and
    values, and of the queries that read them, in float32 over passes that copy at most half of
    the rows (`layers.attention.rows`). The joint kernel of `triton` copies none. The score matrices
    of `reference` are not counted.

    Args:
        config: a checked configuration.
        pack: rows of the micro-batch, of this context parallel rank.
    """
    llm, tp = config.model.llm, config.parallel.tp
    e = 2 if config.train.precision == "bf16" else 4
    query = llm.num_attention_heads * llm.head_dim / tp
    keys_values = 2 * llm.groups_per_rank(tp) * llm.head_dim
    asking = pack.text + (pack.visual if config.attention.v2v == "causal" else 0)
    gathered = gathered_bytes_at_work(config, pack)
    if config.parallel.cp > 1 and config.attention.v2v == "diagonal":
        asking *= config.parallel.cp  # the queries of all ranks
    if config.attention.backend == "triton":
        return gathered + e * keys_values * pack.visual + (8 + 3 * e) * query * asking
    # Sums; of a pass the keys, values and their gradients, and one of the sums' rows.
    visual = 4 + e + 1
    # Gradients of outputs and queries, the sum; of a pass queries, outputs and gradients, and the
    # sum's rows.
    text = 2 * e + 4 + 2 * e + 2
    return gathered + visual * keys_values * pack.visual + text * query * asking


def stage_bytes(config: Config, layers: list[int], pack: Rows, fp8: bool) -> tuple[float, float]:
    """Bytes of a stage's layers for one micro-batch.

    Args:
        config: a checked configuration.
        layers: numbers of the language model's layers in the stage.
        pack: rows of the micro-batch.
        fp8: linears in FP8.

    Returns:
        What is kept until backward, and what backward needs beside it while it computes again.
    """
    llm, train, tp = config.model.llm, config.train, config.parallel.tp
    e = 2 if train.precision == "bf16" else 4
    entered = e * llm.hidden_size / shards_of(config).tensor  # of a row, into a layer
    gradients = decoder_gradients(config)
    layers = [layer for layer in layers if gradients[layer].any]
    if train.recompute_visual_chunk is not None:
        # Visual rows go alone: kept are those that entered the stage, and keys and values.
        keys_values = e * 2 * llm.groups_per_rank(tp) * llm.head_dim
        visual_kept = pack.visual * (entered + len(layers) * keys_values)
        chunk = dataclasses.replace(
            pack, text=0, visual=min(train.recompute_visual_chunk, pack.visual)
        )
        each = [layer_bytes(config, chunk, fp8, layer) for layer in layers]
        full = train.recompute == "full"
        at_work = sum(each)
        if full:
            at_work = len(layers) * entered * chunk.visual + max(each, default=0.0)
        kept, beside = stage_bytes(_without_chunks(config), layers, _text_alone(pack), fp8)
        return kept + visual_kept, max(beside, at_work)
    again = recomputed_layers(config)
    rows = pack.text + pack.visual
    by_layer = {layer: layer_bytes(config, pack, fp8, layer) for layer in layers}
    whole = sum(by_layer[layer] for layer in layers if layer not in again)
    short = [by_layer[layer] for layer in layers if layer in again]
    # The recomputed ones are the first: backward has let go of the others before it comes to them.
    return whole + len(short) * entered * rows, max(0.0, max(short, default=0.0) - whole)


def _without_chunks(config: Config) -> Config:
    train = dataclasses.replace(config.train, recompute_visual_chunk=None)
    return dataclasses.replace(config, train=train)


def _text_alone(pack: Rows) -> Rows:
    return dataclasses.replace(pack, visual=0)


def _tower_bytes(config: Config, pack: Rows) -> tuple[float, float]:
    """Bytes kept by the tower and the projector, and those of the tower's layer at work."""
    vision, llm = config.model.vision, config.model.llm
    _, tp = tower_ranks(config)
    e = 2 if config.train.precision == "bf16" else 4
    rows = pack.tiles * vision.rows_per_tile
    v, f = vision.hidden_size, vision.ffn_hidden_size
    mlp = tower_features(config.model).mlp_products * f  # read by activation and second linear
    layer = rows * (8 * v + e * (2 * v + (3 * v + v + mlp) / tp))
    kept = layer * sum(gradients.any for gradients in tower_gradients(config))
    if "vision.patch_embedding.weight" in learning_outside(config).keys:
        kept += e * 3 * vision.image_size**2 * pack.tiles  # pixels
    # The projector's input, what its activation reads and gives, and the input of its two norms.
    projector = e * v + 2 * e * config.model.projector.ffn_hidden_size / tp + 8 * llm.hidden_size
    return kept + rows * projector * learns_before_layers(config), layer


def working_memory(
    config: Config, stage: int, pack: Rows, num_microbatches: int, fp8: bool
) -> WorkingMemory:
    """Activations and buffers of a rank of a stage.

    Args:
        config: a checked configuration.
        stage: pipeline stage.
        pack: rows of an average micro-batch, of this context parallel rank (`context.rank_rows`).
        num_microbatches: of a replica.
        fp8: linears in FP8.
    """
    llm, tp = config.model.llm, config.parallel.tp
    e = 2 if config.train.precision == "bf16" else 4
    layers = [layer for chunk in layers_of_stage(config, stage) for layer in chunk]
    kept, beside = stage_bytes(config, layers, pack, fp8)
    rows, shards = pack.text + pack.visual, shards_of(config).tensor
    # Angles of all rows; the first layer's input, which the schedule or the embedding holds.
    kept += 4 * rows * llm.head_dim * len(llm.ropes)
    if stage > 0:
        kept += e * rows / shards * llm.hidden_size
    if stage == 0:
        tower_kept, tower_layer = _tower_bytes(config, pack)
        kept += tower_kept
    if stage == config.parallel.pp - 1:
        # The final norm's input, and the rows that the loss reads.
        kept += 4 * llm.hidden_size * pack.text / shards + e * llm.hidden_size * pack.labelled
    activations = kept * micro_batches_in_flight(config, stage, num_microbatches)
    if shards > 1:  # into which Megatron-Core's linears gather
        activations += e * rows * llm.hidden_size
    at_once = pack.text + min(pack.visual, config.train.recompute_visual_chunk or pack.visual)
    mlp = e * 2 * llm.ffn_hidden_size / tp * at_once
    working = max(mlp, attention_bytes(config, pack)) + beside  # one after the other
    buffers = LIBRARY_BYTES
    logits = 0.0
    if stage == 0:
        working = max(working, tower_layer)
        buffers += 2 * 3 * config.model.vision.image_size**2 * pack.tiles
    if stage == config.parallel.pp - 1:
        at_once = min(pack.labelled, config.train.loss_chunk)
        # Logits in both dtypes, while those of the chunk before, if there is one, are still there;
        # with a soft-cap the gradient and the cap's slope beside them.
        chunks = 1 if pack.labelled <= config.train.loss_chunk else 2
        wide = chunks * (e + 4) if llm.final_softcap is None else e + 4 * 4
        logits = at_once * llm.padded_vocab_size / tp * wide
    linears = llm.hidden_size * (
        2 * llm.num_attention_heads * llm.head_dim
        + 2 * llm.num_query_groups * llm.head_dim
        + 3 * llm.ffn_hidden_size
    )
    copies = 2.0 * linears / tp * len(layers) if fp8 else 0.0
    return WorkingMemory(activations, working, logits, copies, buffers)
