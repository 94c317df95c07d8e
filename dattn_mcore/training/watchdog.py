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
_ENDED = "ended: "  # before the reason, where a rank says by itself that it ends


@dataclass(frozen=True)
class _Phase:
    name: str
    since: float
    limit: float
    setting: str


@dataclass(frozen=True)
class Lost:
    """A rank that is gone.

    Attributes:
        rank: its number.
        host: where it ran; empty where nobody knows.
        last: what it did last, or why it ended.
        spoke: it said itself why it ended.
    """

    rank: int
    host: str
    last: str
    spoke: bool


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

    @property
    def doing(self) -> str:
        """The phase that this rank is in."""
        return self._phase.name

    @property
    def has_ended(self) -> bool:
        """Whether this rank has reported to the others that it is about to end."""
        return self._phase.name.startswith(_ENDED)

    def ended(self, reason: str) -> None:
        """Tells the other ranks why this one is about to end."""
        self._phase = _Phase(f"{_ENDED}{reason}", time.monotonic(), 0.0, "")
        faulthandler.cancel_dump_traceback_later()
        self._tell()

    def lost(self) -> list[Lost]:
        """Ranks that have ended, after a collective failed here; takes some seconds.

        A rank that lives goes on counting, in whatever it is held up.
        """
        if self.store is None:
            return []
        try:
            self.store.set_timeout(datetime.timedelta(seconds=BEAT_SECONDS))
            before = self._read(self.store)
            until = time.monotonic() + 3 * BEAT_SECONDS
            silent = set(before) - {self.rank}
            while silent and time.monotonic() < until:
                time.sleep(BEAT_SECONDS / 4)
                after = self._read(self.store)
                silent = {
                    rank
                    for rank in silent
                    if after[rank][2] == before[rank][2] or after[rank][1].startswith(_ENDED)
                }
                if any(after[rank][1].startswith(_ENDED) for rank in silent):
                    silent = {rank for rank in silent if after[rank][1].startswith(_ENDED)}
                    break
            return [self._last(rank, after) for rank in sorted(silent)] if silent else []
        except Exception:  # noqa: BLE001 (whatever the store raises, it is gone)
            return [Lost(0, "", "or torchrun on its machine: their store gives no answer", False)]

    def _last(self, rank: int, reports: dict[int, tuple[str, str, int]]) -> Lost:
        host, name, _ = reports[rank]
        spoke = name.startswith(_ENDED)
        last = name.removeprefix(_ENDED) if spoke else f"last heard of: {name}"
        return Lost(rank, host, last, spoke)

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
