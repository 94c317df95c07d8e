"""Runs `checker.py` under the releases, two at a time, each process for all its exports."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.matrix.releases import environment_of, folder_of

CHECKER = Path(__file__).with_name("checker.py")
SECONDS = 1800  # of one release, on a machine that has much other work; 30 on a quiet one


class Matrix:
    """Reports of exports by release.

    Args:
        folder: for what the processes write.
        plan: exports by release; all are started at once.
    """

    def __init__(self, folder: Path, plan: dict[str, list[Path]]) -> None:
        self._pool = ThreadPoolExecutor(2)
        self._reports: dict[str, Future[dict[str, Any]]] = {
            release: self._pool.submit(examine, folder / release, release, exports)
            for release, exports in plan.items()
        }

    def report(self, release: str, export: str) -> dict[str, Any]:
        """What `checker.py` says of an export.

        Raises:
            Unavailable: the release cannot be installed.
        """
        return self._reports[release].result()["exports"][export]

    def close(self) -> None:
        """Waits for what runs; the rest is not started."""
        self._pool.shutdown(cancel_futures=True)


def examine(folder: Path, release: str, exports: Iterable[Path]) -> dict[str, Any]:
    """Runs the checker in a process of its own.

    Raises:
        Unavailable: the release cannot be installed.
    """
    packages = folder_of(release)
    # A copy in an empty folder: Python looks for modules beside the script first.
    folder.mkdir(parents=True)
    script = shutil.copyfile(CHECKER, folder / CHECKER.name)
    done = subprocess.run(
        [sys.executable, str(script), *map(str, exports)],
        cwd=folder,
        env=environment_of(packages, folder / "home"),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"transformers {release}: {done.stderr[-4000:]}"
    report = json.loads(done.stdout)
    expected = release if packages is None else packages.name.split("-")[0]
    assert expected in (report["transformers"], release), report["transformers"]
    return report
