"""A signal that asks to stop ends the step, saves, and exits; all ranks agree on when.

SIGHUP is a closed terminal, SIGINT is Ctrl-C, SIGUSR1 and SIGUSR2 are what batch systems send,
SIGXCPU is a limit of CPU time. torchrun passes on SIGHUP, SIGINT, SIGQUIT and SIGTERM.
"""

from __future__ import annotations

import os
import select
import signal
import time
from types import FrameType

STOPPING = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
AGAIN_SECONDS = 2.0  # torchrun passes on a Ctrl-C that the terminal has sent to its ranks as well


class StopRequest:
    """Remembers the first stopping signal this process received; a later Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._since = 0.0
        self._previous = {
            number: signal.signal(number, self._remember)
            for number in STOPPING
            if signal.getsignal(number)
            is not signal.SIG_IGN  # as of nohup, or a job in the background
        }

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _say_nothing_to_closed_terminals()
        if self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() > self._since + AGAIN_SECONDS:
            raise KeyboardInterrupt

    def restore(self) -> None:
        """Puts the handlers back that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _say_nothing_to_closed_terminals() -> None:
    """Lets what goes to a terminal that was closed go nowhere.

    A library that prints while a checkpoint is written would raise an error, and end the save.
    """
    for number in (1, 2):
        poll = select.poll()
        poll.register(number, 0)
        if any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
