"""Context parallelism in the planner: rows of a rank, and the bytes it sends for attention.

Visual rows, n = parallel.cp ranks of a group: each rank keeps V/n of them and T/n text rows. Of a
layer with D-Attn a rank sends only what belongs to text rows, T_r of them on each rank (h heads and
g key/value groups of a tensor parallel rank, head size d, w bytes of an activation):

    forward    (n-1) T_r (hd w [queries] + 2gd w [keys, values] + hd w [outputs] + 4h [lse])
    backward   (n-1) T_r (2hd w [gradients and outputs] + 4h [lse] + hd w + 2gd w [gradients])

The baseline of comparisons is ring attention, whose keys and values of all rows go round:

    forward    (n-1) (V+T)/n 2gd w
    backward   (n-1) (V+T)/n 4gd w   (and their gradients: the fewest turns that bring them home)

Closed form of Ulysses, for comparison (Vidi1.5): queries, keys, values and outputs of all rows
change from rows to heads and back, forward and backward alike: (n-1)/n (V+T)/n (2h + 2g) d w. Only
what these two send depends on V.
"""

from __future__ import annotations

import dataclasses
import math

from dattn_mcore.config.checks import row_multiple
from dattn_mcore.config.schema import Config
from dattn_mcore.plan.backward import decoder_gradients, learns_before_layers
from dattn_mcore.plan.flops import recomputed_layers
from dattn_mcore.plan.parameters import layers_of_stage
from dattn_mcore.plan.rows import Rows

LSE_BYTES = 4  # a log-sum-exp is float32


def rank_rows(config: Config, pack: Rows) -> Rows:
    """Rows and pairs of one context parallel rank, of a micro-batch of the whole group.

    Rows and pairs are shared out evenly; the tower's tiles stay whole, and the rank with most is
    counted. Pairs of text and visual rows are those of all queries with the rank's visual rows.

    Args:
        config: a checked configuration.
        pack: rows of the micro-batch.
    """
    cp, (ranks, _) = config.parallel.cp, tower_ranks(config)
    if ranks == 1:
        return pack
    tiles = math.ceil(pack.tiles / ranks)
    own = pack * (1 / cp) if cp > 1 else pack
    return dataclasses.replace(own, tiles=float(tiles), packs=pack.packs)


def tower_ranks(config: Config) -> tuple[int, int]:
    """Ranks that share out the tiles of a pack, and ranks that share each tile's computation."""
    parallel = config.parallel
    if parallel.tower == "tiles":
        return parallel.cp * parallel.tp, 1
    return parallel.cp, parallel.tp


def rings(config: Config) -> bool:
    """Whether all rows see rows of other ranks: ring attention, which is planned and not built."""
    return config.parallel.cp > 1 and config.attention.v2v == "causal"


def gathered_bytes(config: Config, own: Rows) -> float:
    """Bytes that a layer keeps of other ranks until backward: queries, and text keys and values.

    Ring attention sends keys and values again in backward, and keeps none but its own.

    Args:
        config: a checked configuration.
        own: rows of the rank.
    """
    cp = config.parallel.cp
    if cp == 1 or rings(config):
        return 0.0
    query, keys_values, _ = _row_bytes(config)
    return cp * own.text * (query * bool(own.tiles) + keys_values)


def gathered_bytes_at_work(config: Config, own: Rows) -> float:
    """Bytes of what a layer's backward gathers and returns beside what it kept.

    D-Attn: gradients of outputs and merged outputs of all queries; gradients of text keys and
    values. Ring attention: the keys and values that are here and those that come, and the same of
    their gradients, in float32.

    Args:
        config: a checked configuration.
        own: rows of the rank.
    """
    cp = config.parallel.cp
    if cp == 1:
        return 0.0
    query, keys_values, w = _row_bytes(config)
    if rings(config):
        return 2 * (own.text + own.visual) * keys_values * (1 + 4 / w)
    return cp * own.text * (2 * query + keys_values)


def _row_bytes(config: Config) -> tuple[float, float, int]:
    """Bytes of a row's queries, of its keys and values, and of one number."""
    llm, tp = config.model.llm, config.parallel.tp
    w = 2 if config.train.precision == "bf16" else 4
    query = llm.num_attention_heads / tp * llm.head_dim * w
    return query, 2 * llm.groups_per_rank(tp) * llm.head_dim * w, w


def attention_bytes_sent(config: Config, own: Rows) -> tuple[float, float]:
    """Bytes that a rank sends for the attention of one layer and micro-batch.

    Args:
        config: a checked configuration.
        own: rows of the rank (`rank_rows`); those of padding count.

    Returns:
        Forward, backward.
    """
    cp = config.parallel.cp
    query, keys_values, _ = _row_bytes(config)
    if rings(config):
        rows = own.text + own.visual
        return (cp - 1) * rows * keys_values, (cp - 1) * rows * 2 * keys_values
    hops = (cp - 1) * own.text
    if not own.tiles:  # text keys and values alone, and their gradients
        return hops * keys_values, hops * keys_values
    lse = LSE_BYTES * config.model.llm.num_attention_heads / config.parallel.tp
    return hops * (2 * query + keys_values + lse), hops * (3 * query + keys_values + lse)


def ulysses_bytes_sent(config: Config, own: Rows) -> float:
    """What Ulysses would send for the attention of one layer, forward; as much backward.

    Args:
        config: a checked configuration.
        own: rows of the rank.
    """
    cp = config.parallel.cp
    query, keys_values, _ = _row_bytes(config)
    return (cp - 1) / cp * (own.text + own.visual) * (2 * query + keys_values)


def context_bytes(config: Config, stage: int, own: Rows) -> float:
    """Bytes that a rank of a stage sends for the attention of one micro-batch.

    Args:
        config: a checked configuration.
        stage: pipeline stage.
        own: rows of the rank.
    """
    if config.parallel.cp == 1:
        return 0.0
    forward, backward = attention_bytes_sent(config, own)
    gradients, again = decoder_gradients(config), recomputed_layers(config)
    train = config.train
    core = train.recompute == "selective" and "core_attn" in train.recompute_modules
    sent = 0.0
    for layer in (layer for chunk in layers_of_stage(config, stage) for layer in chunk):
        sent += forward * (1 + (gradients[layer].any and (layer in again or core)))
        sent += backward * gradients[layer].scores_computed
    return sent


def rows_dealt(
    tiles: int, rows_per_tile: int, ranks: int, visual: int | None = None
) -> list[tuple[int, int]]:
    """Visual rows that change their rank before the first layer.

    Rank r encodes tiles r*N//n to (r+1)*N//n, and its layers work on the r-th n-th of the rows.

    Args:
        tiles: of the micro-batch, in order.
        rows_per_tile: visual rows of each.
        ranks: that share the pack (`tower_ranks`).
        visual: rows with padding at their end, a multiple of `ranks`; None: as many as it takes.

    Returns:
        Of each rank: rows it sends, and rows it gets, whose gradients it sends back.
    """
    rows = tiles * rows_per_tile
    share = -(-rows // ranks) if visual is None else visual // ranks
    dealt = []
    for rank in range(ranks):
        encoded = [number * tiles // ranks * rows_per_tile for number in (rank, rank + 1)]
        held = [min(number * share, rows) for number in (rank, rank + 1)]
        stay = max(min(encoded[1], held[1]) - max(encoded[0], held[0]), 0)
        dealt.append((encoded[1] - encoded[0] - stay, held[1] - held[0] - stay))
    return dealt


def dealt_bytes(config: Config, pack: Rows) -> float:
    """Bytes that the rank which sends most sends before the first layer, and in backward.

    Backward returns gradients where the projector or the tower learns.

    Args:
        config: a checked configuration.
        pack: rows of the whole micro-batch.
    """
    (ranks, _), w = tower_ranks(config), 2 if config.train.precision == "bf16" else 4
    if ranks == 1:
        return 0.0
    back = learns_before_layers(config)
    per_tile, multiple = config.model.vision.rows_per_tile, row_multiple(config)
    tiles = math.ceil(pack.tiles)
    padded = -(-tiles * per_tile // multiple) * multiple
    dealt = rows_dealt(tiles, per_tile, ranks, padded)
    return max(sent + got * back for sent, got in dealt) * config.model.llm.hidden_size * w
