"""Both ends of the releases of Megatron-Core that pyproject.toml allows, in folders of their own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from tests.installed import Unavailable, cache, pip

ROOT = Path(__file__).parents[2]
FOLDER_VARIABLE = "DATTN_MEGATRON_FOLDER"  # where releases lie
INSTALLED = importlib.metadata.version("megatron-core")
# 0.17 and later ask for Python 3.12, and run under 3.11 as well, which is what is tested here.
FOR_PYTHON = ["--python-version", "3.12", "--only-binary=:all:", "--no-deps"]


def allowed() -> Requirement:
    """What pyproject.toml says of Megatron-Core."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^\s*"(megatron-core[^"]*)"', text, re.MULTILINE)
    assert found is not None, "pyproject.toml names no megatron-core"
    return Requirement(found[1])


def oldest() -> str:
    """The lower bound."""
    (bound,) = [one for one in allowed().specifier if one.operator == ">="]
    return bound.version


def ends() -> list[str]:
    """The releases to test beside the one that is installed; each lies in its folder.

    Raises:
        Unavailable: the index cannot be reached.
    """
    found = {oldest(), _unpacked(str(allowed()))} - {INSTALLED}
    assert found, f"{allowed()} allows no other release than {INSTALLED}"
    for release in found:
        if not folder_of(release).is_dir():
            _unpacked(f"megatron-core=={release}")
    return sorted(found, key=Version)


def folder_of(release: str) -> Path:
    """Where a release lies."""
    return cache("megatron-releases", FOLDER_VARIABLE) / release


def _unpacked(requirement: str) -> str:
    """Downloads the newest release that meets a requirement and unpacks it; its version.

    `pip install` would follow a machine's own constraints.

    Raises:
        Unavailable: the index cannot be reached, or has none.
    """
    folder = folder_of("")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".downloading-") as name:
        pip("download", "--dest", name, *FOR_PYTHON, requirement)
        (wheel,) = Path(name).glob("*.whl")
        release = wheel.name.split("-")[1]
        if not folder_of(release).is_dir():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(Path(name) / "package")
            (Path(name) / "package").rename(folder_of(release))
    return release


def run(release: str, *arguments: str) -> str:
    """What Python prints, in a process that has a release, this project and this environment."""
    path = [] if release == INSTALLED else [str(folder_of(release))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, str(ROOT)])}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def jobs(release: str, **settings: dict[str, Any]) -> dict[str, Any]:
    """What jobs of `tests.megatron.jobs` return, under a release."""
    results: dict[str, Any] = json.loads(
        run(release, "-m", "tests.megatron.jobs", json.dumps(settings))
    )
    return results


__all__ = ["INSTALLED", "Unavailable", "ends", "jobs", "run"]
