"""The order of samples."""

from __future__ import annotations

import pytest

from dattn_mcore.data.order import SampleOrder, epoch_permutation

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
    order = SampleOrder(10, seed=7)
    endless = [i for epoch in range(5) for i in epoch_permutation(10, 7, epoch).tolist()]
    assert [i for step in range(7) for i in order.indexes(step, 7)] == endless[:49]


@pytest.mark.parametrize("size", [3, 25])
def test_any_step_can_be_asked_for_first(size: int) -> None:
    forward = SampleOrder(10, seed=7)
    in_order = [forward.indexes(step, size) for step in range(6)]
    backward = SampleOrder(10, seed=7)
    assert [backward.indexes(step, size) for step in reversed(range(6))] == in_order[::-1]


def test_batches_may_change_size_without_changing_the_order() -> None:
    order = SampleOrder(10, seed=7)
    assert order.indexes(0, 12) == order.indexes(0, 6) + order.indexes(1, 6)


def test_nothing_to_order() -> None:
    with pytest.raises(ValueError, match="at least one"):
        SampleOrder(0, seed=1)
