"""Tasks of lmms-eval that fail alone: they get no score, and the others get theirs.

lmms-eval asks for the answers of all tasks in one call, and an exception ends them all. It scores a
document by the requests that name it, and passes over one that no request names: that is how a
failed task is taken out. An empty answer would be scored as a wrong one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import distributed

from dattn_mcore.errors import DattnError

logger = logging.getLogger("dattn_mcore.evaluation.lmms_eval_model")


class TaskFailures:
    """The failed tasks of a run.

    Attributes:
        reasons: why each failed, by its name.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self._requests: dict[str, list[Any]] = {}

    def seen(self, requests: Sequence[Any]) -> None:
        """Keeps requests, in case that their task fails."""
        for request in requests:
            self._requests.setdefault(request.task_name, []).append(request)

    def add(self, task: str, error: Exception) -> None:
        """Fails a task of this process, in one logged line."""
        first = " ".join(str(error).split())[:300]
        plain = isinstance(error, DattnError | NotImplementedError)
        self.reasons[task] = first if plain else f"{type(error).__name__}: {first}"
        logger.error("dattn_mcore: %s; the other tasks go on", self._line(task))
        self._take_out(task)

    def share(self) -> None:
        """Fails here what failed on another process: its documents alone would be no score."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        everywhere: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everywhere, self.reasons)
        for reasons in everywhere:
            for task, reason in reasons.items():
                self.reasons.setdefault(task, reason)
        for task in self.reasons:
            self._take_out(task)

    def summary(self) -> str:
        """One line of all of them."""
        return "; ".join(map(self._line, self.reasons))

    def _line(self, task: str) -> str:
        return f"task {task} failed and has no score ({self.reasons[task]})"

    def _take_out(self, task: str) -> None:
        requests = self._requests.get(task, [])
        # The task's own list also has those that lmms-eval took from its cache of responses.
        owners = [getattr(request.args[2], "__self__", None) for request in requests[:1]]
        for request in [*requests, *(r for o in owners for r in getattr(o, "instances", []))]:
            request.doc_id = None
