"""Processes that write a checkpoint end with the rank that forked them, even if it was killed."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


@functools.cache
def end_forks_with_parent() -> None:
    """Asks the kernel to kill every process that this one, or one of those, forks from now on.

    Megatron-Core forks writers that would wait for a killed rank for ever. The kernel watches the
    thread that forked, so forks belong into threads that live as long as the process. Processes
    that start another program (subprocess) are not concerned. Does nothing but on Linux.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    parent = [0]

    def in_child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent[0]:  # it ended before the kernel was asked
            os._exit(1)

    os.register_at_fork(before=lambda: parent.__setitem__(0, os.getpid()), after_in_child=in_child)
