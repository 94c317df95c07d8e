"""The order of samples."""

from __future__ import annotations

import numpy as np
import pytest

from dattn_mcore.data.order import SampleOrder, Share, epoch_permutation


def order_of(*sizes: int, seed: int, weights: tuple[float, ...] = ()) -> SampleOrder:
    """Sources whose samples are numbered one after the other."""
    starts = np.cumsum([0, *sizes])
    return SampleOrder(
        [
            Share(np.arange(start, start + size), weight)
            for start, size, weight in zip(
                starts, sizes, weights or (1.0,) * len(sizes), strict=False
            )
        ],
        seed,
    )


GOLDEN = [5, 6, 3, 9, 7, 4, 1, 2, 8, 0]


def test_an_epoch_shows_every_sample_once() -> None:
    assert sorted(epoch_permutation(101, seed=3, epoch=2).tolist()) == list(range(101))


def test_epochs_and_seeds_differ() -> None:
    orders = {
        tuple(epoch_permutation(50, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_golden_order_keeps_for_good() -> None:
    # A resume after an upgrade of NumPy must read the same samples.
    assert epoch_permutation(10, seed=1234, epoch=0).tolist() == GOLDEN


def test_steps_cut_the_endless_order_into_batches() -> None:
    order = order_of(10, seed=7)
    endless = [i for epoch in range(5) for i in epoch_permutation(10, 7, epoch).tolist()]
    assert [i for step in range(7) for i in order.numbers(7 * step, 7 * step + 7)] == endless[:49]


@pytest.mark.parametrize("size", [3, 25])
def test_any_step_can_be_asked_for_first(size: int) -> None:
    forward = order_of(10, seed=7)
    in_order = [forward.numbers(step * size, (step + 1) * size) for step in range(6)]
    backward = order_of(10, seed=7)
    assert [
        backward.numbers(step * size, (step + 1) * size) for step in reversed(range(6))
    ] == in_order[::-1]


def test_batches_may_change_size_without_changing_the_order() -> None:
    order = order_of(10, seed=7)
    assert order.numbers(0, 12) == order.numbers(0, 6) + order.numbers(6, 12)


def test_nothing_to_order() -> None:
    with pytest.raises(ValueError, match="at least one"):
        order_of(0, seed=1)


def test_sources_of_weight_one_are_one_source() -> None:
    assert order_of(4, 6, seed=7).numbers(0, 30) == order_of(10, seed=7).numbers(0, 30)


def test_half_a_source_an_epoch_sees_all_of_it_in_two() -> None:
    order = order_of(9, 8, seed=3, weights=(1.0, 0.5))
    assert order.epoch_size == 13
    epochs = [order.epoch(epoch).tolist() for epoch in range(4)]
    for epoch in epochs:
        assert sorted(number for number in epoch if number < 9) == list(range(9))
    halves = [sorted(number for number in epoch if number >= 9) for epoch in epochs]
    assert sorted(halves[0] + halves[1]) == sorted(halves[2] + halves[3]) == list(range(9, 17))
    assert halves[0] != halves[2]


def test_a_source_of_weight_two_and_a_half() -> None:
    order = order_of(10, seed=3, weights=(2.5,))
    counts = np.bincount([n for epoch in (0, 1) for n in order.epoch(epoch)], minlength=10)
    assert counts.tolist() == [5] * 10
    assert set(np.bincount(order.epoch(0))) == {2, 3}
