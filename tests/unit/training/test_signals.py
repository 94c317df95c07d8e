"""Every signal that asks a process to end lets the run save first."""

import os
import signal

import pytest

from dattn_mcore.training.signals import StopRequest

# Whose default is the end of the process, and which somebody sends on purpose: a closed terminal,
# a shell, a batch system, torchrun (SIGTERM, SIGINT, SIGHUP, SIGQUIT), a limit of CPU time.
NAMES = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU")


@pytest.mark.parametrize("name", NAMES)
def test_it_is_remembered(name):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        stop = StopRequest()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # the kernel and a launcher may both send it
        assert stop.received == number
        stop.restore()
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_what_was_ignored_stays_ignored():
    """`nohup` ignores SIGHUP: the run goes on without its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received is None
        stop.restore()
    finally:
        signal.signal(signal.SIGHUP, before)
