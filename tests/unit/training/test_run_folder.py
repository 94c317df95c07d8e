"""Two runs do not write into one run folder."""

import socket
import subprocess
import sys

import pytest

from dattn_mcore.errors import ConfigError
from dattn_mcore.training import run_folder

OTHER_RUN = """
import sys, time
from pathlib import Path
from dattn_mcore.training.run_folder import _lock

held = _lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_folder_in_use_is_refused_until_its_run_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE_SECONDS", 0.5)
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER_RUN, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        holder = f"process {other.pid} on {socket.gethostname()}"
        with pytest.raises(ConfigError, match=f"is being written by {holder}; end that run"):
            run_folder._lock(tmp_path)
    finally:
        other.kill()
        other.wait()
    with run_folder._lock(tmp_path) as held:
        assert not held.closed
