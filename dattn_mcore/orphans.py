"""No process outlives the one that it works for, even if that was killed."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def signal_when_parent_ends(number: signal.Signals) -> None:
    """Asks the kernel for a signal when this process's parent ends; does nothing but on Linux.

    The kernel watches the parent's thread that started this process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


@functools.cache
def end_forks_with_parent() -> None:
    """Has every process that this one, or one of those, forks from now on end with its parent.

    Megatron-Core forks writers of a checkpoint, which would wait for a killed rank for ever.
    Processes that start another program (subprocess) are not concerned.
    """
    parent = [0]

    def in_child() -> None:
        signal_when_parent_ends(signal.SIGKILL)
        if os.getppid() != parent[0]:  # it ended before the kernel was asked
            os._exit(1)

    os.register_at_fork(before=lambda: parent.__setitem__(0, os.getpid()), after_in_child=in_child)


def end_with_parent(parent: int) -> None:
    """Has this program end when the process that started it ends, however that ends.

    Args:
        parent: id of that process, which may have ended before this one could ask.
    """
    signal_when_parent_ends(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    if sys.platform != "linux":
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
