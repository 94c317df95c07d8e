"""Ends a rank that makes no progress, and says where it stands and which ranks are silent.

Collectives wait for ranks that never come: one that was stopped, lost its node, or hangs in a
file system. The process group's own timeout ends such a run without a word about the cause. Here
a thread of every rank watches the phase that the rank is in; when a phase outlasts its limit it
names the phase and the ranks that differ, dumps the stacks of all threads, and ends the process.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass, replace
from typing import Any, TextIO

from dattn_mcore.console import printable

logger = logging.getLogger(__name__)

EXIT_STATUS = 3  # of a rank that the watchdog ended; a user's mistake is 2
BEAT_SECONDS = 2.0  # how often a rank tells the others where it stands
GRACE_SECONDS = 30.0  # after this, stacks are dumped even if no Python thread can run


@dataclass(frozen=True)
class _Phase:
    name: str
    since: float
    limit: float
    setting: str


class Watchdog:
    """Watches the phases of one rank.

    Args:
        rank: of this process.
        world_size: number of ranks.
        store: where ranks tell each other where they stand (torch.distributed's store); without
            one the watchdog speaks for its own rank only.
        output: where message and stacks go; a real file.
    """

    def __init__(
        self, rank: int, world_size: int, store: Any = None, output: TextIO | None = None
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.output = output or sys.stderr
        self.host = socket.gethostname()
        # A connection of its own: the run's may be waiting for a key when the thread needs it.
        self.store = store.clone() if store is not None and world_size > 1 else None
        self.beat = 0
        self._phase = _Phase("starting", time.monotonic(), 0.0, "")
        self._closed = threading.Event()
        self._tell()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def phase(self, name: str, limit: float, setting: str) -> None:
        """Begins a phase.

        Args:
            name: what this rank does now, as the message says it.
            limit: seconds it may take; 0 for no limit.
            setting: that holds the limit.
        """
        self._phase = _Phase(name, time.monotonic(), limit, setting)
        if limit > 0:
            # Held by C code, the interpreter runs no thread of ours; this one needs none.
            faulthandler.dump_traceback_later(limit + GRACE_SECONDS, exit=True, file=self.output)
        else:
            faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """Stops watching."""
        faulthandler.cancel_dump_traceback_later()
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            phase = self._phase
            pause = BEAT_SECONDS
            if phase.limit > 0:
                pause = min(pause, max(phase.since + phase.limit - time.monotonic(), 0.01))
            if self._closed.wait(pause):
                return
            self._tell()
            if phase is self._phase and 0 < phase.limit <= time.monotonic() - phase.since:
                self._end(phase)

    def _end(self, phase: _Phase) -> None:
        seconds = time.monotonic() - phase.since
        others: list[str] = []
        # The rank that holds the store may be the one that is stopped: do not wait for it long.
        asking = threading.Thread(target=lambda: others.extend(self._others(phase)), daemon=True)
        asking.start()
        while asking.is_alive() and time.monotonic() - phase.since < seconds + 3 * BEAT_SECONDS:
            self._tell()  # others may be asking, too
            asking.join(BEAT_SECONDS / 4)
        if self._closed.is_set() or phase is not self._phase:
            return  # it went on while the others were asked
        lines = [
            f"hung: rank {self.rank} on {self.host}: {phase.name} takes longer than "
            f"{phase.setting}={phase.limit:g} seconds ({seconds:.0f} so far); the run ends here "
            "and goes on from its newest checkpoint when it is started again",
            *others,
        ]
        self._phase = replace(phase, name=f"{phase.name}, ended by its watchdog")
        self._tell()
        self.output.write("\n".join(map(printable, lines)) + "\n")
        self.output.flush()
        faulthandler.dump_traceback(self.output, all_threads=True)
        self.output.flush()
        os._exit(EXIT_STATUS)

    def _tell(self) -> None:
        if self.store is None:
            return
        self.beat += 1
        phase = self._phase
        entry = [self.host, phase.name, self.beat]
        with contextlib.suppress(Exception):  # the store is gone: the watchdog goes on without it
            self.store.set(f"watchdog/{self.rank}", json.dumps(entry))

    def _others(self, phase: _Phase) -> list[str]:
        """One line per rank that is silent or somewhere else."""
        if self.store is None:
            return []
        try:
            self.store.set_timeout(datetime.timedelta(seconds=BEAT_SECONDS))
            before = self._read(self.store)
            # Clocks of hosts differ, counters do not: a silent rank's stands still.
            time.sleep(1.5 * BEAT_SECONDS)
            after = self._read(self.store)
        except Exception:  # noqa: BLE001 (whatever the store raises, the run ends now)
            return ["the ranks' store gives no answer: the process that holds it may be stopped"]
        lines = []
        for rank, (host, name, beat) in after.items():
            if rank == self.rank:
                continue
            if beat == before[rank][2]:
                lines.append(f"rank {rank} on {host} gives no sign of life; last heard of: {name}")
            elif name != phase.name:
                lines.append(f"rank {rank} on {host} is elsewhere: {name}")
        shown = lines[:16]
        if len(lines) > len(shown):
            shown.append(f"and {len(lines) - len(shown)} ranks more")
        return shown or ["all ranks are in this phase and alive"]

    def _read(self, store: Any) -> dict[int, tuple[str, str, int]]:
        keys = [f"watchdog/{rank}" for rank in range(self.world_size)]
        return {rank: tuple(json.loads(value)) for rank, value in enumerate(store.multi_get(keys))}
