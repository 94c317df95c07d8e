"""`parallel.tower=tiles`: each tensor parallel rank encodes tiles of its own with the whole tower.

Losses, every gradient and the gradient norm are those of one process; each tile is encoded once.
"""

from collections import defaultdict

import pytest

from dattn_mcore.config.load import from_dict, merge
from dattn_mcore.plan.rows import rows_of
from dattn_mcore.plan.tower_work import tower_cost
from tests.distributed.gradient_jobs import spans
from tests.distributed.interrupted_jobs import train_until_killed
from tests.distributed.jobs import read_metrics, run_training
from tests.distributed.small_models import SMALL_MODEL, small_config
from tests.distributed.test_gradients_as_declared import unlike, whole
from tests.distributed.tower_jobs import bytes_before_the_layers, step_of_packs

ROWS = 16  # of a tile
ONE = (((True, ROWS), (False, 9)), ((False, 4), (True, ROWS), (False, 6), (True, ROWS), (False, 3)))
ANYRES = (((False, 2), (True, 5 * ROWS), (False, 7)), ((True, ROWS), (False, 5)))
# Tiles that do not divide evenly, a canvas over several ranks, more ranks than tiles, and none.
PACKS = [
    (ONE, ()),
    (ANYRES, ((2, 2), (0, 0))),
    ((((False, 5), (True, ROWS), (False, 8)),), ()),
    ((((False, 11),), ((False, 4),)), ()),
]
TILES = [3, 6, 1]
PROJECTOR = {"train": {"trains": ["projector"]}}
LANGUAGE = {"train": {"trains": ["llm"]}}
TP2_SP = {"tp": 2, "sp": True}
# Other settings, ranks, layout.
CASES = {
    "tp2": ({}, 2, {"tp": 2}),
    "tp2-sp": ({}, 2, TP2_SP),
    "tp4": ({}, 4, {"tp": 4}),
    "tp2-cp2": ({}, 4, {"tp": 2, "cp": 2}),
    "tp2-sp-cp2": ({}, 4, {**TP2_SP, "cp": 2}),
    "tp2-sp-pp2": ({}, 4, {**TP2_SP, "pp": 2}),
    "tp2-sp-dp2, overlap": ({}, 4, {**TP2_SP, "overlap_grad_reduce": True}),
    "tp2-sp, only the projector learns": (PROJECTOR, 2, TP2_SP),
    "tp2-cp2, only the projector learns": (PROJECTOR, 4, {"tp": 2, "cp": 2}),
    "tp2, only the language model learns": (LANGUAGE, 2, {"tp": 2}),
}


def tree_of(settings, parallel):
    room = {"data": {"visual_budget": 8 * ROWS, "text_budget": 64}}
    return merge(merge({"model": SMALL_MODEL, **room}, settings), {"parallel": parallel})


@pytest.fixture(scope="module")
def alone(pool):
    """Of one process, by settings."""
    done = {}

    def run(settings):
        if repr(settings) not in done:
            (done[repr(settings)],) = pool.run(step_of_packs, 1, tree_of(settings, {}), PACKS)
        return done[repr(settings)]

    return run


@pytest.mark.parametrize(
    ("case", "tower"),
    [
        *((case, "tiles") for case in CASES),
        *((case, "tensor") for case in CASES if case != "tp4"),  # its tower has two heads
    ],
)
def test_a_step_is_that_of_one_process(pool, alone, case, tower):
    settings, ranks, parallel = CASES[case]
    expected = alone(settings)
    steps = pool.run(step_of_packs, ranks, tree_of(settings, {**parallel, "tower": tower}), PACKS)
    want, held = whole(expected.gradients, "after"), defaultdict(list)
    for one in (one for step in steps for one in step.gradients):
        held[one.key].append(one)
    assert set(held) == set(want)
    problems = [
        f"{key} on {one.place}: {words}"
        for key, ones in held.items()
        for one in ones
        if (words := unlike(one.after, want[key][spans(one.offset, one.after.shape)]))
    ]
    assert not problems
    for part in settings.get("train", {}).get("trains", ["vision", "projector", "llm"]):
        learned = [value for key, value in want.items() if part_is(key, part)]
        assert max(float(value.abs().max()) for value in learned) > 1e-4
    for step in steps:
        assert step.norm == pytest.approx(expected.norm, rel=1e-5)
    replicas = ranks // (parallel.get("tp", 1) * parallel.get("cp", 1) * parallel.get("pp", 1))
    loss = sum(step.loss for step in steps if step.loss is not None)
    assert loss == pytest.approx(replicas * expected.loss, rel=1e-6)


def part_is(key, part):
    return key.startswith(f"{part}.") or (
        part == "llm" and not key.startswith(("vision.", "projector."))
    )


@pytest.mark.parametrize("case", ["tp2", "tp2-sp", "tp4", "tp2-sp-cp2"])
def test_each_tile_is_encoded_once_and_ranks_have_as_many(pool, case):
    settings, ranks, parallel = CASES[case]
    tree = tree_of(settings, {**parallel, "tower": "tiles"})
    for pack, total in zip(PACKS, TILES, strict=False):
        steps = pool.run(step_of_packs, ranks, tree, [pack])
        counts = [sum(step.tiles) for step in steps]  # a rank without any runs no tower
        assert sum(counts) == total
        assert max(counts) - min(counts) <= 1


def test_otherwise_each_tensor_rank_works_on_each_tile(pool):
    tree = tree_of({}, {"tp": 2, "tower": "tensor"})
    assert [step.tiles for step in pool.run(step_of_packs, 2, tree, PACKS)] == [TILES, TILES]


def tree_of_run(digits, run_dir, parallel):
    train = {"steps": 4, "global_batch_size": 12}
    return small_config(digits, run_dir, parallel=parallel, train=train)


@pytest.fixture(scope="module")
def uninterrupted(pool, digits, tmp_path_factory):
    """Metrics of four steps in one process."""
    run_dir = tmp_path_factory.mktemp("whole")
    pool.run(run_training, 1, tree_of_run(digits, run_dir, {}))
    return read_metrics(run_dir)


@pytest.mark.parametrize("first", ["tensor", "tiles"])
def test_a_checkpoint_of_either_is_resumed_in_the_other(
    pool, digits, tmp_path, uninterrupted, first
):
    """And by one process: within 1e-6, as for any other layout (`test_resume`)."""
    other = {"tensor": "tiles", "tiles": "tensor"}[first]
    pool.run(train_until_killed, 2, tree_of_run(digits, tmp_path, {**TP2_SP, "tower": first}), 2)
    pool.run(train_until_killed, 2, tree_of_run(digits, tmp_path, {"tp": 2, "tower": other}), 1)
    assert all(pool.run(run_training, 1, tree_of_run(digits, tmp_path, {})))
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row, want in zip(rows, uninterrupted, strict=True):
        assert row["loss"] == pytest.approx(want["loss"], abs=1e-6)
        assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(pool, digits, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    parallel = {**TP2_SP, "tower": "tiles"}
    assert all(pool.run(run_training, 2, tree_of_run(digits, whole, parallel)))
    pool.run(train_until_killed, 2, tree_of_run(digits, parts, parallel), 2)
    assert all(pool.run(run_training, 2, tree_of_run(digits, parts, parallel)))
    names = ("loss", "grad_norm", "lr")
    assert [[row[name] for name in names] for row in read_metrics(parts)] == [
        [row[name] for name in names] for row in read_metrics(whole)
    ]


@pytest.mark.parametrize("tower", ["tensor", "tiles"])
@pytest.mark.parametrize("case", ["tp2", "tp2-sp", "tp2-cp2", "tp2-sp-cp2", "tp2-sp, frozen tower"])
def test_bytes_are_those_of_the_closed_form(pool, case, tower):
    """To the byte, of the rank that sends most: what the tower exchanges up to the first layer."""
    ranks, parallel = CASES[case.partition(",")[0]][1:]
    tree = tree_of(PROJECTOR if "frozen" in case else {}, {**parallel, "tower": tower})
    layouts = (((True, 5 * ROWS), (False, 8)), ((True, 2 * ROWS), (False, 8)))
    tree["data"]["pad_multiple"] = 1
    sent = pool.run(bytes_before_the_layers, ranks, tree, (layouts, ()))
    config = from_dict(tree)
    cost = tower_cost(config, rows_of(config, layouts, 1), tower)
    assert max(sent) == pytest.approx(cost.bytes, rel=1e-12)
