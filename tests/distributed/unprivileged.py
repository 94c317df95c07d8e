"""Jobs in which a file without read permission cannot be read, even where tests run as root.

Root reads everything by two capabilities of the kernel. They are taken from the worker's thread,
which hands on what it has to the threads it starts, and given back after the job.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.distributed.interrupted_jobs import train_until_killed
from tests.distributed.jobs import run_training

_READ_ANYTHING = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH (linux/capability.h)
_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3: two structs of 32 capabilities each


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable"))


@contextmanager
def _as_anyone() -> Iterator[None]:
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = _Header(_VERSION, 0), (_Sets * 2)()

    def call(function: Any) -> None:
        if function(ctypes.byref(header), sets):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    call(libc.capget)
    had = sets[0].effective
    sets[0].effective = had & ~_READ_ANYTHING
    call(libc.capset)
    try:
        with tempfile.NamedTemporaryFile() as file:
            os.chmod(file.name, 0)
            assert not os.access(file.name, os.R_OK, effective_ids=True)
        yield
    finally:
        sets[0].effective = had
        call(libc.capset)


def run_training_as_anyone(tree: dict[str, Any]) -> bool:
    """`run_training`, without root's right to read everything."""
    with _as_anyone():
        return run_training(tree)


def train_until_killed_as_anyone(tree: dict[str, Any], step: int) -> bool:
    """`train_until_killed`, without root's right to read everything."""
    with _as_anyone():
        return train_until_killed(tree, step)
