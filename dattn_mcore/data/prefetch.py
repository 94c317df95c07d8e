"""Global batches ahead of time: one thread, in the order of steps, a bounded queue."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from dattn_mcore.data.batch import GlobalBatch


class Prefetcher:
    """Builds global batches ahead of time in one thread, in order of steps."""

    def __init__(self, build: Callable[[int], GlobalBatch], depth: int) -> None:
        self._build = build
        self._depth = depth
        self._worker: _Worker | None = None

    def get(self, step: int) -> GlobalBatch:
        """Returns the batch of `step`, or raises what its making raised."""
        if self._depth < 1:
            return self._build(step)
        if self._worker is None or self._worker.next_step != step:
            self.close()
            self._worker = _Worker(self._build, step, self._depth)
        try:
            return self._worker.take()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stops the thread; what it prepared is dropped."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None


class _Worker:
    """One run of the thread, from one step on, until it is stopped or building fails."""

    def __init__(self, build: Callable[[int], GlobalBatch], step: int, depth: int) -> None:
        self.next_step = step
        self._build = build
        self._depth = depth
        self._ready: deque[GlobalBatch | BaseException] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(
            target=self._run, args=(step,), name="prefetch", daemon=True
        )
        self._thread.start()

    def take(self) -> GlobalBatch:
        """Waits for the next batch."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            item = self._ready.popleft()
            self._changed.notify_all()
        if isinstance(item, BaseException):
            raise item
        self.next_step += 1
        return item

    def stop(self) -> None:
        """Ends the thread, after the batch it is at."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self, step: int) -> None:
        while not self._stopped:
            item: GlobalBatch | BaseException
            try:
                item = self._build(step)
            except BaseException as error:  # noqa: BLE001  (raised again where it is asked for)
                item = error
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or len(self._ready) < self._depth)
                self._ready.append(item)
                self._changed.notify_all()
            if isinstance(item, BaseException):
                return
            step += 1
