"""Pools of ranks with Transformer Engine's own Python code, one for each release."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.installed import Unavailable
from tests.te.pool import TePool
from tests.te.releases import NEWEST_TESTED, folder_of, releases


@pytest.fixture(scope="session")
def te_pools() -> Iterator[Callable[[str], TePool]]:
    """The pool of a release, which is started when it is first asked for."""
    pools: dict[str, TePool] = {}

    def pool_of(release: str) -> TePool:
        if release not in pools:
            try:
                pools[release] = TePool(folder_of(release))
            except Unavailable as error:
                pytest.skip(str(error))
        return pools[release]

    yield pool_of
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def te(te_pools) -> TePool:
    """Of the newest release that is tested."""
    return te_pools(NEWEST_TESTED)


@pytest.fixture(scope="session", params=releases())
def any_te(request, te_pools) -> TePool:
    """Of each release."""
    return te_pools(request.param)
