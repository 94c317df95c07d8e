"""The converter's benchmark at its small scale: all of it runs; no time is judged."""

import os
import re
import subprocess
import sys

from benchmarks.results import ROOT


def test_there_and_back_at_the_small_scale(tmp_path):
    """Both directions are compared with a copy, every weight comes back, nothing is left."""
    command = [sys.executable, "-m", "benchmarks.convert_full_size", "--scale", "small"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path), "--repeats", "1"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for direction in ("hf-to-mcore", "mcore-to-hf"):
        assert re.search(rf"^{direction}: \d+\.\d\d of the copy's speed, peak", done.stdout, re.M)
        for row in (f"copy of the input of {direction}", direction):
            assert re.search(rf"^\| {row} \| \d+\.\d\d \|", done.stdout, re.M)
    assert re.search(r"^mcore-to-hf with its check: -?\d+\.\d s more, peak \d", done.stdout, re.M)
    back = re.search(r"there and back: (\d+) tensors, 0 of them not equal", done.stdout)
    assert back is not None and int(back[1]) > 20
    assert list(tmp_path.iterdir()) == []
