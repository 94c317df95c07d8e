"""Bytes that context parallelism sends: counted on every rank, equal to the closed forms.

The count is held, too, against what the operating system says that a process wrote.
"""

from __future__ import annotations

import math

import pytest

from benchmarks.context_checks import HEADERS, planned_bytes, problems
from benchmarks.context_formulas import Shape, dattn_bytes, ring_bytes, ulysses_bytes
from benchmarks.context_ranks import SIDE, layer_attention, layer_ring, step_config, training_step

TEXT, HEADS, GROUPS, SIZE, LAYERS = 512, 4, 1, 16, 2


def shape_of(visual):
    return Shape(visual, TEXT, HEADS, GROUPS, SIZE)


def check(sent, formula, ranks):
    assert (sent.forward, sent.backward) == formula
    if sent.written is not None:  # headers of messages come on top
        assert 0 <= sent.written - sum(formula) <= HEADERS * ranks * sent.calls


@pytest.mark.parametrize("visual", [1_000, 10_000, 100_000])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_layers_traffic_is_its_closed_form_whatever_the_visual_rows(pool, ranks, visual):
    # By hand: 128 or 256 rows' worth to each other rank; float32 queries of 64 numbers, keys and
    # values of 32, log-sum-exps of 4.
    per_rank = TEXT // ranks * (ranks - 1)
    formula = per_rank * 4 * (64 + 32 + 64 + 4), per_rank * 4 * (64 + 64 + 4 + 64 + 32)
    assert dattn_bytes(shape_of(visual), ranks) == formula
    assert planned_bytes(shape_of(visual), ranks, LAYERS)["layer"] == formula
    for sent in pool.run(layer_attention, ranks, shape_of(visual)):
        check(sent, formula, ranks)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_rings_traffic_grows_with_all_rows(pool, ranks):
    shape = shape_of(1_000)
    keys_values = (1_000 + TEXT) // ranks * 32 * 4
    formula = (ranks - 1) * keys_values, (ranks - 1) * 2 * keys_values
    assert ring_bytes(shape, ranks) == formula
    for sent in pool.run(layer_ring, ranks, shape):
        check(sent, formula, ranks)


@pytest.mark.parametrize(("ranks", "visual"), [(2, 700), (4, 1_000)])
def test_a_steps_traffic_by_purpose(pool, ranks, visual):
    """Rows before the first layer go once, from the rank of their tile to their own, and back."""
    shape, per_tile = shape_of(visual), SIDE * SIDE
    tiles = visual // per_tile
    config = step_config(shape, ranks, LAYERS)
    row, multiple = 4 * config.model.llm.hidden_size, math.lcm(config.data.pad_multiple, ranks)
    share = -(-visual // multiple) * multiple // ranks
    moves = []
    for number in range(visual):
        (encodes,) = (
            rank
            for rank in range(ranks)
            if rank * tiles // ranks <= number // per_tile < (rank + 1) * tiles // ranks
        )
        moves.append((encodes, number // share))
    results = pool.run(training_step, ranks, shape, LAYERS)
    for rank, step in enumerate(results):
        assert step.attention == LAYERS * sum(dattn_bytes(shape, ranks))
        away = sum(one == rank != other for one, other in moves)
        come = sum(other == rank != one for one, other in moves)
        assert step.exchange == (away + come) * row
    planned = planned_bytes(shape, ranks, LAYERS)
    assert {step.attention for step in results} == {planned["attention"]}
    assert max(step.exchange for step in results) == planned["exchange"] > 0
    # Ring or tree, a reduction sends most of the weights' gradients; sums of losses are small.
    assert {step.gradients for step in results} == {results[0].gradients}
    assert results[0].gradients > 100_000 > max(step.other for step in results)


def test_recomputation_repeats_the_forward_pass(pool):
    shape = shape_of(1_000)
    forward, backward = dattn_bytes(shape, 2)
    expected = LAYERS * (2 * forward + backward)
    assert planned_bytes(shape, 2, LAYERS, "full")["attention"] == expected
    for step in pool.run(training_step, 2, shape, LAYERS, "full"):
        assert step.attention == expected


def test_closed_forms_at_the_sizes_of_mistral():
    """MiB of a layer in bf16, T = 512, 8 ranks: worked out apart, by hand."""
    mistral = Shape(100_000, 512, heads=32, groups=8, head_dim=128, number_bytes=2)
    assert round(sum(ring_bytes(mistral, 8)) / 2**20) == 1031
    assert round(sum(dattn_bytes(mistral, 8)) / 2**20, 1) == 21.1
    # 12,564 rows of a rank; a row has 80 heads' worth of numbers, of which 7 eighths go.
    assert ulysses_bytes(mistral, 8) == (12_564 * 80 * 128 * 2 * 7 // 8,) * 2


def test_fewer_groups_than_ranks_are_repeated_for_ulysses():
    shape = Shape(1_000, 512, heads=4, groups=1, head_dim=16)
    assert ulysses_bytes(shape, 4)[0] == 1_512 // 4 * (4 + 4 + 4 + 4) * 16 * 4 * 3 // 4


def test_a_count_that_is_not_the_closed_form_is_said():
    shape = shape_of(1_000)
    forward, backward = dattn_bytes(shape, 2)
    right = {"forward": forward, "backward": backward, "written": forward + backward, "calls": 8}
    ring = dict(zip(("forward", "backward"), ring_bytes(shape, 2), strict=True), written=None)
    ring["calls"] = 4
    row = {
        "ranks": 2,
        "attention": [right, right],
        "ring": [ring, ring],
        "step": [{"attention": LAYERS * (forward + backward), "exchange": 0}],
        "formula": (forward, backward),
        "ring_formula": ring_bytes(shape, 2),
        "planned": planned_bytes(shape, 2, LAYERS),
    }
    assert problems(row, LAYERS) == []
    written = right["written"]
    miscounted = {"forward": forward + 1, "written": written + 1}
    for wrong in (miscounted, {"written": 0}, {"written": 2 * written}):
        (line,) = problems({**row, "attention": [right, {**right, **wrong}]}, LAYERS)
        assert line.startswith("attention, rank 1: ")
    (line,) = problems({**row, "step": [{"attention": 7, "exchange": 0}]}, LAYERS)
    assert line.startswith("step, rank 0: counted 7, ")
    (line,) = problems({**row, "planned": {**row["planned"], "exchange": 1.0}}, LAYERS)
    assert line.startswith("planner: ")
