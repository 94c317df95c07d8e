"""The processes of an evaluation: started alone or by torchrun, they share a small store.

Each process answers its own rows without the others, so no process group is needed: only the word
that a shard is done, and counters for the progress.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

LONG = timedelta(days=30)  # a shard may take hours; torchrun ends us all if a process dies
POLL_SECONDS = 0.2


class Processes:
    """This process among those of the run.

    Attributes:
        rank: number of this process.
        size: number of processes.
        local_rank: number among those of this machine.
        local_size: processes of this machine.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._alone: dict[str, int] = {}
        self._store: Any = None
        if self.size > 1:
            from torch.distributed import PrefixStore
            from torch.distributed.rendezvous import rendezvous

            store, _, _ = next(iter(rendezvous("env://", timeout=LONG)))
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = PrefixStore(f"evaluation/{attempt}", store)

    def add(self, name: str, number: int) -> int:
        """Adds to a counter of all processes; returns its value."""
        if self._store is None:
            self._alone[name] = self._alone.get(name, 0) + number
            return self._alone[name]
        return int(self._store.add(f"count/{name}", number))

    def post(self, name: str, text: str) -> None:
        """Leaves this process's word under a name."""
        if self._store is not None:
            self._store.set(f"word/{name}/{self.rank}", text)

    def wait(self, name: str, rank: int, meanwhile: Callable[[], None] = lambda: None) -> str:
        """The word of another process, as soon as it is there."""
        key = f"word/{name}/{rank}"
        while not self._store.check([key]):
            meanwhile()
            time.sleep(POLL_SECONDS)
        return str(self._store.get(key).decode())

    def collect(
        self, name: str, own: str, meanwhile: Callable[[], None] = lambda: None
    ) -> list[str]:
        """The words of all processes by rank; to be called by rank 0."""
        return [own, *(self.wait(name, rank, meanwhile) for rank in range(1, self.size))]
