"""Steps: which samples each takes, whatever the layout, wherever a run was stopped."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.data_path_packing import ROOT, steps_of_mix
from dattn_mcore.config.load import load_config
from dattn_mcore.config.schema import Config
from dattn_mcore.data.balance import row_work, split_over_ranks
from dattn_mcore.data.grouped_order import GroupedOrder
from dattn_mcore.data.order import SampleOrder, Share
from dattn_mcore.data.packing import make_packs
from dattn_mcore.data.pipeline import DataPipeline
from dattn_mcore.data.steps import FixedSteps, FullSteps, Steps, full_steps
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from dattn_mcore.errors import ConfigError

BUDGETS = (50, 64)


def full(lengths: list[tuple[int, int]], packs: int, seed: int = 3, most: int = 40) -> FullSteps:
    order = SampleOrder([Share(np.arange(len(lengths)))], seed)
    rows = np.array(lengths, np.int64).reshape(-1, 2)
    return FullSteps(order, rows, BUDGETS, packs, 0.9, most)


LENGTHS = st.lists(
    st.tuples(st.integers(0, 50), st.sampled_from([0, 0, 16, 32, 64])), min_size=1, max_size=50
)


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, packs=st.integers(1, 4), jumps=st.lists(st.integers(0, 30), max_size=6))
def test_steps_follow_each_other_and_are_as_long_as_fits(
    lengths: list[tuple[int, int]], packs: int, jumps: list[int]
) -> None:
    """Over several epochs, and the same wherever one starts to ask."""
    steps = full(lengths, packs)
    order = SampleOrder([Share(np.arange(len(lengths)))], 3)
    room = [int(budget * packs * 0.9) for budget in BUDGETS]
    bounds = [steps.bounds(step) for step in range(31)]
    assert bounds[0][0] == 0
    for (_, end), (start, _) in pairwise(bounds):
        assert start == end
    for start, end in bounds:
        assert 1 <= end - start <= 40
        taken = [lengths[n] for n in order.numbers(start, end + 1)]
        sums = np.cumsum(taken, axis=0)
        assert end - start == 1 or (sums[-2] <= room).all()
        assert end - start == 40 or (sums[-1] > room).any()
    again = full(lengths, packs)
    assert [again.bounds(step) for step in jumps] == [bounds[step] for step in jumps]
    for position in range(1, bounds[-1][1], 7):
        assert (
            bounds[again.up_to(position) - 1][0] < position <= bounds[again.up_to(position) - 1][1]
        )


def test_fixed_steps() -> None:
    steps = FixedSteps(12)
    assert steps.bounds(3) == (36, 48)
    assert [steps.up_to(n) for n in (1, 12, 13, 40)] == [1, 1, 2, 4]


@pytest.fixture(scope="module", params=[False, True], ids=["square", "anyres"])
def mix(request: pytest.FixtureRequest) -> tuple[list[list[tuple[int, int]]], tuple[int, int]]:
    """Steps of the benchmark's LLaVA-like lengths under the settings of configs/gemma_it.yaml."""
    return steps_of_mix(request.param, 40)


@pytest.mark.parametrize("dp_size", [1, 2, 4, 8, 16])
def test_packs_of_a_llava_like_mix_are_full_and_ranks_even(
    mix: tuple[list[list[tuple[int, int]]], tuple[int, int]], dp_size: int
) -> None:
    steps, budgets = mix
    config = load_config(ROOT / "configs" / "gemma_it.yaml")
    work = row_work(config)
    rows, made = np.zeros(2), 0
    for lengths in steps:
        shares = split_over_ranks(
            make_packs(lengths, *budgets, dp_size), lengths, dp_size, budgets, work
        )
        packs = [pack for share in shares for pack in share]
        assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
        sums = np.array([np.sum([lengths[i] for i in pack], axis=0) for pack in packs])
        assert (sums <= budgets).all()
        rows, made = rows + sums.sum(0), made + len(packs)
        loads = (sums @ work).reshape(dp_size, -1).sum(1)
        assert loads.max() <= 1.05 * loads.mean()
    assert (rows / made / budgets).max() >= 0.95
    # A step is still about as many samples as the recipe's.
    mean = sum(map(len, steps)) / len(steps)
    assert mean == pytest.approx(config.train.global_batch_size, rel=0.1)


def test_a_multiple_that_would_change_the_batch_is_refused() -> None:
    order = SampleOrder([Share(np.arange(100))], 1)
    rows = np.tile(np.array([[10, 16]]), (100, 1))
    assert full_steps(order, rows, BUDGETS, 16, 4).packs == 4
    with pytest.raises(ConfigError, match="data.step_packs_multiple=16: .*=16 samples fill 4.0"):
        full_steps(order, rows, BUDGETS, 16, 16)
    with pytest.raises(ConfigError, match="samples fill 23.0 packs, and 16 would be another"):
        full_steps(order, rows, BUDGETS, 92, 16)


@pytest.mark.parametrize("multiple", [None, 4])
@pytest.mark.parametrize("seed", range(3))
def test_stopped_anywhere_with_any_dp_nothing_is_lost_or_seen_twice(
    make_config: Callable[..., Config],
    toy_tokenizer: SentencePieceTokenizer,
    multiple: int | None,
    seed: int,
) -> None:
    """A run over three epochs, stopped at random steps, each part with another number of ranks."""
    rng = random.Random(seed)
    config = make_config(global_batch_size=14, step_packs_multiple=multiple, prefetch=1)

    def batches(dp_size: int, steps: range) -> list[tuple[tuple[int, ...], list[int]]]:
        """What each step is said to have, and what its ranks really hold."""
        parts = []
        for rank in range(dp_size):
            pipeline = DataPipeline(
                config,
                toy_tokenizer,
                dp_rank=rank,
                dp_size=dp_size,
                microbatch_multiple=1,
                needs_pixels=False,
            )
            parts.append([pipeline.global_batch(step) for step in steps])
            pipeline.close()
        found = []
        for ranks in zip(*parts, strict=True):
            assert len({batch.samples for batch in ranks}) == 1
            held = [n for batch in ranks for micro in batch.microbatches for n in micro.samples]
            found.append((ranks[0].samples, sorted(held)))
        return found

    count = 15
    whole = batches(1, range(count))
    stops = sorted(rng.choices(range(count + 1), k=4))  # some at once after another, some twice
    parts = []
    for start, end in pairwise([0, *stops, count]):
        parts += batches(rng.choice([1, 2, 3, 4]), range(start, end))
    assert parts == whole
    drawn = [number for numbers, _ in whole for number in numbers]
    assert len(drawn) > 3 * 40
    for epoch in range(3):
        assert sorted(drawn[epoch * 40 : (epoch + 1) * 40]) == list(range(40))
    for numbers, held in whole:
        assert sorted(numbers) == held


def test_a_whole_run_counts_its_steps(
    make_config: Callable[..., Config], toy_tokenizer: SentencePieceTokenizer
) -> None:
    """The last step of an epoch reaches its end, and no step more is needed."""
    config = make_config(global_batch_size=14, step_packs_multiple=4)
    pipeline = DataPipeline(
        config, toy_tokenizer, dp_rank=0, dp_size=1, microbatch_multiple=1, needs_pixels=False
    )
    steps: Steps = pipeline.steps
    assert isinstance(steps, FullSteps)
    count = steps.up_to(40)
    assert steps.bounds(count - 1)[0] < 40 <= steps.bounds(count - 1)[1]
    pipeline.close()


def grouped(lengths: list[tuple[int, int]], sets: list[int], packs: int) -> FullSteps:
    order = GroupedOrder([Share(np.arange(len(lengths)))], 3, np.array(sets, np.uint64), None)
    rows = np.array(lengths, np.int64).reshape(-1, 2)
    return FullSteps(order, rows, BUDGETS, packs, 1.0, 40)


def test_full_steps_count_the_rows_of_a_group_once_and_end_between_groups() -> None:
    """Groups of 3 with 5 text rows each on one image of 64: a pack of 50 text rows holds them."""
    lengths, sets = [(5, 64)] * 60, [i // 3 for i in range(60)]
    steps = grouped(lengths, sets, packs=4)
    for step in range(5):
        start, end = steps.bounds(step)
        assert (start, end) == (12 * step, 12 * step + 12)
    apart = full(lengths, 4)
    assert apart.bounds(0) == (0, 3)  # of 4 packs 0.9


def test_a_group_too_large_for_what_may_be_left_is_divided() -> None:
    """Groups of 8 and room for 10: keeping the second whole would leave a fifth, 2 samples."""
    lengths, sets = [(5, 16)] * 40, [i // 8 for i in range(40)]
    assert grouped(lengths, sets, packs=1).bounds(0) == (0, 8)
    # Groups of 6 would leave 4 of 10.
    sets = [i // 6 for i in range(40)]
    assert grouped(lengths, sets, packs=1).bounds(0) == (0, 10)
    # The rest of the divided group shows its image once more: 16 + 16 + 16 + 16 are the budget.
    assert grouped(lengths, sets, packs=1).bounds(1) == (10, 18)


def test_groups_fill_packs_that_samples_apart_would_not_fit() -> None:
    """The number of packs of a step follows from shared rows: 16 samples in 2 packs, not 16."""
    lengths, sets = np.tile([[5, 64]], (160, 1)), np.arange(160) // 8
    order = GroupedOrder([Share(np.arange(160))], 3, sets.astype(np.uint64), None)
    assert full_steps(order, lengths, BUDGETS, 16, 2).packs == 2
    plain = SampleOrder([Share(np.arange(160))], 3)
    assert full_steps(plain, lengths, BUDGETS, 16, 2).packs == 16


def test_a_quarter_of_a_step_is_a_quarter_of_its_rows() -> None:
    """Few large groups among many small ones: rows, not samples, say how much is left empty."""
    rng = random.Random(5)
    lengths: list[tuple[int, int]] = []
    sets: list[int] = []
    for one in range(60):
        text, count = rng.choice([(3, 12), (30, 2)])
        lengths += [(text, 4)] * count
        sets += [one] * count
    steps, order = grouped(lengths, sets, packs=3), grouped(lengths, sets, packs=3)._order
    room = 3 * BUDGETS[0]
    filled = []
    for step in range(12):
        start, end = steps.bounds(step)
        if end >= len(lengths):
            break
        rows = sum(lengths[number][0] for number in order.numbers(start, end))
        filled.append(rows / room)
    assert len(filled) > 5 and min(filled) >= 0.75 - 30 / room
