"""The model in somebody else's training loop: the shipped example, as a user starts it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_example_learns(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/python/own_loop.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines()]
    assert len(losses) == 8
    # It starts near the logarithm of 384 ids, 5.95, and learns its one pack by heart.
    assert 5.5 < losses[0] < 7.5
    assert losses[-1] < losses[0] / 2
