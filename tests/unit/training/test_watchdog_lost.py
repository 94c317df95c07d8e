"""Who is gone when a collective fails: ranks that count no more, or said that they end."""

import contextlib
import socket
import time

import pytest
import torch.distributed as dist

from dattn_mcore.training import watchdog
from dattn_mcore.training.watchdog import Lost, Watchdog

HOST = socket.gethostname()


@pytest.fixture
def dogs(monkeypatch):
    """Those of three ranks, which tell each other every 0.2 seconds where they are."""
    monkeypatch.setattr(watchdog, "BEAT_SECONDS", 0.2)
    store = dist.HashStore()
    with contextlib.ExitStack() as stack:
        made = [Watchdog(rank, 3, store) for rank in range(3)]
        for dog in made:
            stack.callback(dog.close)
            dog.phase("step 7", 0, "")
        time.sleep(0.5)  # all have reported it
        yield made


def test_nobody_is_lost(dogs):
    assert dogs[0].lost() == []


def test_a_rank_that_counts_no_more_is_lost(dogs):
    dogs[1].close()
    time.sleep(0.3)
    assert dogs[0].lost() == [Lost(1, HOST, "last heard of: step 7", False)]


def test_a_rank_that_says_why_it_ends_is_the_cause(dogs):
    """It goes on counting until its process has ended."""
    dogs[2].ended("KeyError: 'nobody foresaw this'")
    began = time.monotonic()
    assert dogs[0].lost() == [Lost(2, HOST, "KeyError: 'nobody foresaw this'", True)]
    assert time.monotonic() - began < 5
    assert dogs[2].doing.endswith("nobody foresaw this'")


def test_a_store_that_is_gone(dogs, monkeypatch):
    def fails(_):
        raise RuntimeError("connection reset")

    monkeypatch.setattr(dogs[1], "_read", fails)
    (lost,) = dogs[1].lost()
    assert (lost.rank, lost.spoke) == (0, False) and "gives no answer" in lost.last


def test_alone_nobody_can_be_lost():
    dog = Watchdog(0, 1)
    assert dog.lost() == []
    dog.close()
