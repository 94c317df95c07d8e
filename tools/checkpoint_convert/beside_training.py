"""`mcore-to-hf` beside a run: at low priority, and no longer than the run.

A run starts it: `python -m tools.checkpoint_convert.beside_training PARENT CHECKPOINT OUTPUT`, with
the number of its own process.
"""

from __future__ import annotations

import os
import signal
import sys

from dattn_mcore.orphans import signal_when_parent_ends
from tools.checkpoint_convert.__main__ import interruptible

NICENESS = 10  # the run's own processes go first


def main(arguments: list[str]) -> int:
    """Exports a checkpoint; returns the converter's status."""
    parent, checkpoint, output = arguments
    os.nice(NICENESS)
    signal_when_parent_ends(signal.SIGTERM)
    if os.getppid() != int(parent):  # it ended before the kernel was asked
        return 128 + signal.SIGTERM
    return interruptible(["mcore-to-hf", checkpoint, output])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
