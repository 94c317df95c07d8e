"""Jobs of `pool` that draw for rows in a layout."""

from __future__ import annotations

import torch

from dattn_mcore.parallel import platform
from dattn_mcore.parallel.groups import destroy_model_parallel, initialize_model_parallel


def drawn_for_rows(parallel: dict[str, int], own: bool) -> tuple[int, int, float, float]:
    """(tp rank, cp rank, two draws for this rank's rows); a reloaded state repeats the second."""
    groups = initialize_model_parallel(seed=7, **parallel)
    try:
        first = _draw(own)
        state = platform.rng_state()
        second = _draw(own)
        platform.set_rng_state(state)
        assert _draw(own) == second
        return groups.tp.rank(), groups.cp.rank(), first, second
    finally:
        destroy_model_parallel()


def _draw(own: bool) -> float:
    with platform.rng_of_rows(own=own):
        return float(torch.rand(()))
