"""Packages that single tests need, in folders of their own: installed once, and left out of `.venv`."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


class Unavailable(Exception):
    """A package cannot be installed here: no pip, no index, or no such release in it."""


def cache(name: str, variable: str) -> Path:
    """Where folders of a kind lie: in a virtual environment, so that they go with it; else the user's
    cache.

    Args:
        name: of the kind.
        variable: of the environment, which may name another place.
    """
    named = os.environ.get(variable)
    if named:
        return Path(named)
    if sys.prefix != sys.base_prefix:
        return Path(sys.prefix) / name
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dattn-mcore" / name


def folder_with(packages: Sequence[str], folder: Path, constraints: Path) -> Path:
    """A folder with packages and what they need besides this environment; it is made once.

    Args:
        packages: with their versions.
        folder: its parent is made.
        constraints: fixes the versions of what the packages need.

    Raises:
        Unavailable: it cannot be installed.
    """
    if folder.is_dir() and not unmet(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".installing-") as name:
        made = Path(name) / "packages"
        wanted: list[str] = []
        missing = list(packages)
        while missing:
            if missing == wanted:
                raise Unavailable(f"{' '.join(packages)} needs {', '.join(missing)}")
            wanted = missing
            # Without dependencies: pip would copy this environment's numpy and more into the folder.
            limits = ["--constraint", str(constraints), "--target", str(made)]
            pip("install", "--no-deps", "--no-compile", *limits, *wanted)
            missing = unmet(made)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


def unmet(folder: Path) -> list[str]:
    """Requirements of a folder's packages that neither it nor this environment meets."""
    here = {_name(found): found.version for found in importlib.metadata.distributions()}
    found = list(importlib.metadata.distributions(path=[str(folder)]))
    here |= {_name(one): one.version for one in found}
    missing = set()
    for text in {text for one in found for text in one.requires or ()}:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = here.get(canonicalize_name(requirement.name))
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            missing.add(f"{requirement.name}{requirement.specifier}")
    return sorted(missing)


def _name(distribution: importlib.metadata.Distribution) -> str:
    return canonicalize_name(distribution.metadata["Name"])


def pip(*arguments: str) -> str:
    """What pip prints.

    Raises:
        Unavailable: with its last line.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip() or "pip failed").splitlines()[-1]
        raise Unavailable(f"{' '.join(arguments[-1:])} cannot be installed from the index ({last})")
    return done.stdout
