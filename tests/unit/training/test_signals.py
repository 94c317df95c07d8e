"""Every signal that asks a process to end lets the run save first."""

import os
import signal
import subprocess
import sys

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


CLOSED = """
import os, pathlib, signal, sys
from dattn_mcore.training.signals import StopRequest
StopRequest()
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGHUP)
print("what a library says while it saves", flush=True)
pathlib.Path(sys.argv[1]).write_text("saved")
"""


def test_what_is_said_to_a_closed_terminal_ends_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", CLOSED, str(tmp_path / "saved")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        text=True,
    )
    process.stdout.close()
    process.stderr.close()
    process.stdin.write("now\n")
    process.stdin.close()
    assert process.wait(60) == 0
    assert (tmp_path / "saved").read_text() == "saved"
