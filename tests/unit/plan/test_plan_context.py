"""Context parallelism in the planner: rows of a rank, bytes it sends and keeps, time."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from dattn_mcore.config.checks import row_multiple
from dattn_mcore.config.load import load_config
from dattn_mcore.plan.context import (
    attention_bytes_sent,
    context_bytes,
    dealt_bytes,
    rank_rows,
    rows_dealt,
    ulysses_bytes_sent,
)
from dattn_mcore.plan.estimate import plan_unchecked
from dattn_mcore.plan.hardware import GPUS, Cluster
from dattn_mcore.plan.plot import baseline
from dattn_mcore.plan.rows import rows_of
from dattn_mcore.plan.workload import Sample

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
MIB = 2**20


def config_of(name, cp, *more):
    settings = [f"parallel.cp={cp}", "parallel.tp=1", "parallel.sp=false", "train.fp8=none"]
    settings += ["train.recompute=none", "train.recompute_layers=null", "data.text_budget=512"]
    return load_config(CONFIGS / f"{name}.yaml", [*settings, "data.visual_budget=2000000", *more])


def pack_of(config, *, tiles, text=512):
    layout = ((True, tiles * config.model.vision.rows_per_tile), (False, text))
    return rows_of(config, [layout], labelled=text)


def visual_rows(config, *, visual, text=512):
    """Some number of visual rows, of no whole tiles."""
    return dataclasses.replace(pack_of(config, tiles=1, text=text), visual=visual)


@pytest.mark.parametrize(("name", "mib"), [("mistral_pt", 1031), ("gemma_pt", 2061)])
def test_ring_attention_sends_what_is_published_of_it(name, mib):
    """Keys and values three times round eight ranks, of 100,000 visual and 512 text rows."""
    config = baseline(config_of(name, 8))
    sent = attention_bytes_sent(config, rank_rows(config, visual_rows(config, visual=100_000)))
    assert sum(sent) / MIB == pytest.approx(mib, abs=0.6)


def test_what_d_attn_sends_by_hand():
    """Mistral: 32 heads and 8 groups of 128 in bf16, 64 text rows on each of eight ranks."""
    config = config_of("mistral_pt", 8)
    own = rank_rows(config, pack_of(config, tiles=16))
    queries, keys_values, lse = 32 * 128 * 2, 2 * 8 * 128 * 2, 32 * 4
    assert attention_bytes_sent(config, own) == (
        7 * 64 * (queries + keys_values + queries + lse),
        7 * 64 * (2 * queries + lse + queries + keys_values),
    )
    tensor = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, tp=2))
    assert sum(attention_bytes_sent(tensor, own)) == sum(attention_bytes_sent(config, own)) / 2


def test_what_d_attn_sends_does_not_depend_on_visual_rows():
    config = config_of("mistral_pt", 8)
    sent = {
        attention_bytes_sent(config, rank_rows(config, visual_rows(config, visual=visual)))
        for visual in (1_000, 10_000, 100_000)
    }
    assert len(sent) == 1
    text_alone = rank_rows(config, pack_of(config, tiles=0))
    assert attention_bytes_sent(config, text_alone) == (7 * 64 * 4096, 7 * 64 * 4096)


def test_ulysses_sends_all_heads_of_all_rows():
    """Queries, keys, values and outputs of 60,000 rows on eight ranks, Gemma 2."""
    config = config_of("gemma_pt", 8)
    own = rank_rows(config, visual_rows(config, visual=60_000, text=0))
    # 16 query heads and 8 groups of 256 in bf16; seven eighths of an eighth of the rows.
    assert ulysses_bytes_sent(config, own) == 7 / 8 * 7_500 * (2 * 16 + 2 * 8) * 256 * 2


@pytest.mark.parametrize(
    ("train", "forwards"),
    [
        ([], 1),
        (["train.recompute=full"], 2),
        (["train.recompute=full", "train.recompute_layers=8"], 1 + 8 / 32),
        (["train.recompute=selective", "train.recompute_modules=[core_attn]"], 2),
        (["train.recompute=selective", "train.recompute_modules=[mlp]"], 1),
    ],
)
def test_recompute_sends_forward_again(train, forwards):
    config = config_of("mistral_pt", 4, *train)
    own = rank_rows(config, pack_of(config, tiles=8))
    forward, backward = attention_bytes_sent(config, own)
    assert context_bytes(config, 0, own) == 32 * (forwards * forward + backward)


def test_one_rank_sends_nothing_and_keeps_its_rows():
    config = config_of("mistral_pt", 1)
    pack = pack_of(config, tiles=3)
    assert rank_rows(config, pack) == pack
    assert context_bytes(config, 0, pack) == dealt_bytes(config, pack) == 0


def test_ranks_share_out_rows_and_pairs():
    config = config_of("mistral_pt", 4)
    pack = pack_of(config, tiles=6)
    own = rank_rows(config, pack)
    assert (own.tiles, own.packs) == (2, 1)  # of six tiles two ranks have two
    for name in ("text", "visual", "labelled", "text_pairs", "windowed_text_pairs"):
        assert getattr(own, name) == getattr(pack, name) / 4


@pytest.mark.parametrize(
    ("tiles", "per_tile", "cp", "visual"),
    [
        (8, 4, 4, None),
        (6, 4, 4, None),
        (5, 9, 2, None),
        (3, 5, 4, 16),
        (1, 7, 3, None),
        (7, 3, 4, 32),
    ],
)
def test_rows_that_change_their_rank(tiles, per_tile, cp, visual):
    """Row by row: which rank encoded it, and which one's layers work on it."""
    rows = tiles * per_tile
    share = (visual or -(-rows // cp) * cp) // cp
    moves = np.zeros((cp, cp), dtype=int)
    for row in range(rows):
        encodes = max(r for r in range(cp) if r * tiles // cp <= row // per_tile)
        moves[encodes, row // share] += 1
    np.fill_diagonal(moves, 0)
    expected = list(zip(moves.sum(1).tolist(), moves.sum(0).tolist(), strict=True))
    assert rows_dealt(tiles, per_tile, cp, visual) == expected


def test_gradients_of_dealt_rows_come_back_where_something_learns():
    config = config_of("mistral_pt", 4)
    frozen = config_of("mistral_pt", 4, "train.trains=[llm]")
    pack = pack_of(config, tiles=6)
    rows = [dealt_bytes(each, pack) / (4096 * 2) for each in (config, frozen)]
    per_tile, multiple = config.model.vision.rows_per_tile, row_multiple(config)
    dealt = rows_dealt(6, per_tile, 4, visual=-(-6 * per_tile // multiple) * multiple)
    assert rows == [max(map(sum, dealt)), max(sent for sent, _ in dealt)]


def plan_of(config, *, images, nodes=1):
    return plan_unchecked(config, Cluster(nodes, 8), GPUS["h100"], False, Sample(512, images))


def test_what_visual_rows_cost_falls_with_the_ranks():
    """Memory that they add, and the time of a micro-batch, at a hundred thousand of them."""
    added, seconds = {}, {}
    for cp in (1, 2, 4, 8):
        few, many = (plan_of(config_of("mistral_pt", cp), images=n) for n in (16, 176))
        added[cp] = many.worst.working.activations - few.worst.working.activations
        seconds[cp] = many.seconds / many.step.num_microbatches
    for cp in (2, 4, 8):
        assert added[cp] == pytest.approx(added[1] / cp, rel=0.01)
        assert 1 / cp < seconds[cp] / seconds[1] < 1.25 / cp


def test_gathered_text_is_kept_until_backward():
    """Queries, keys and values of the whole pack in every layer, beside a share of the rows."""
    kept = {}
    for cp in (1, 4):
        plan = plan_of(config_of("mistral_pt", cp), images=16)
        kept[cp] = plan.memory[0].working.activations
    gathered = 32 * 512 * (32 * 128 + 2 * 8 * 128) * 2
    assert kept[4] - gathered == pytest.approx(kept[1] / 4, rel=0.01)


def test_the_optimizer_is_shared_by_data_and_context_ranks():
    plans = [plan_of(config_of("mistral_pt", cp), images=16) for cp in (1, 4)]
    assert [plan.dp for plan in plans] == [8, 2]
    assert plans[0].worst.state == plans[1].worst.state
    data = [{one.group: one for one in plan.exchanges}["data"] for plan in plans]
    assert data[0] == data[1] and data[0].size == 8


def test_the_baseline_loses_as_visual_rows_grow():
    """Its attention is quadratic in all rows however many ranks share it."""
    gains = []
    for images in (32, 256, 1024):
        config = config_of("mistral_pt", 8)
        plans = [plan_of(each, images=images) for each in (config, baseline(config))]
        gains.append(plans[1].seconds / plans[0].seconds)
        context = [{one.group: one.bytes for one in plan.exchanges}["context"] for plan in plans]
        assert context[0] < context[1]
    assert 1 < gains[0] < gains[1] < gains[2]


def test_exchanges_over_nodes_go_through_each_gpus_port():
    """Of eight ranks on one node and eight on another, eight of fifteen peers are far."""
    cluster = Cluster(2, 8)
    assert cluster.exchange_bandwidth(8, 1) == cluster.bandwidth(8, 1)
    assert cluster.exchange_bandwidth(16, 1) == pytest.approx(45e9 * 15 / 8)
    assert cluster.exchange_bandwidth(2, 8) == 45e9
