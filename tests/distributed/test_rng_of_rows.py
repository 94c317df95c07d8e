"""What is drawn for rows differs wherever rows do: over context ranks, and over tensor ranks."""

from __future__ import annotations

import pytest

from tests.distributed.rng_jobs import drawn_for_rows


@pytest.mark.parametrize("own", [False, True], ids=["alike", "own"])
def test_context_ranks_draw_each_their_own(pool, own: bool) -> None:
    ranks = pool.run(drawn_for_rows, 4, {"tp": 2, "cp": 2}, own)
    assert ranks == pool.run(drawn_for_rows, 4, {"tp": 2, "cp": 2}, own)
    assert {(tensor, context) for tensor, context, *_ in ranks} == {
        (tensor, context) for tensor in range(2) for context in range(2)
    }
    draws = {
        (context, tensor if own else 0): (first, second) for tensor, context, first, second in ranks
    }
    # Tensor ranks that hold the same rows draw alike, whatever the key left out.
    assert all(
        draws[context, tensor if own else 0] == (first, second)
        for tensor, context, first, second in ranks
    )
    numbers = [number for pair in draws.values() for number in pair]
    assert len(set(numbers)) == len(numbers) == (8 if own else 4)


def test_without_context_ranks_nothing_changes(pool) -> None:
    """Tensor ranks draw from Megatron-Core's own generators, as runs before did."""
    alike = pool.run(drawn_for_rows, 2, {"tp": 2}, False)
    assert alike[0][2:] == alike[1][2:]
    own = pool.run(drawn_for_rows, 2, {"tp": 2}, True)
    assert own[0][2] != own[1][2]
