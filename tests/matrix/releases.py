"""The releases of transformers that exports are held to, each in a folder of its own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from dattn_mcore.hf import TESTED_TRANSFORMERS

ROOT = Path(__file__).parents[2]
CONSTRAINTS = Path(__file__).with_name("constraints.txt")
# Set to 1, the newest release that the index has and pyproject.toml allows is held to it as well.
NEWEST_VARIABLE = "DATTN_MATRIX_NEWEST"
FOLDER_VARIABLE = "DATTN_MATRIX_FOLDER"  # where releases are installed
NEWEST = "newest of the index"
INSTALLED = importlib.metadata.version("transformers")
# The last release before and the first after each change of what a model has to do with a cache
# or with the inputs of a generation.
CHANGES = {
    "pixels are not handed on after the first step": ("5.12.1", "5.13.0"),
    "Cache.crop takes the number of columns to remove": ("5.14.1", "5.15.0"),
    "samples are repeated by another function": ("5.17.0", "5.18.0"),
    "Cache.get_max_cache_shape is gone": ("5.19.0", "5.20.0"),
    "the cache is called cache": ("5.23.0", "5.24.0"),
}


class Unavailable(Exception):
    """A release cannot be installed here: no pip, no index, or no such release in it."""


def releases() -> list[str]:
    """Releases of the matrix, oldest first; at the end `NEWEST`, where it is asked for."""
    found = {*TESTED_TRANSFORMERS, INSTALLED}
    found.update(release for pair in CHANGES.values() for release in pair)
    ordered = sorted({_patch(release) for release in found}, key=Version)
    return ordered + [NEWEST] * (os.environ.get(NEWEST_VARIABLE) == "1")


def _patch(release: str) -> str:
    """`5.6` is `5.6.0`."""
    return f"{release}.0" if release.count(".") == 1 else release


def newest_of_the_index() -> str:
    """The newest release that pyproject.toml allows.

    Raises:
        Unavailable: the index cannot be reached.
    """
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    allowed = re.search(r'^\s*"(transformers[^"]*)"', text, re.MULTILINE)
    assert allowed is not None, "pyproject.toml names no transformers"
    arguments = ["--dry-run", "--ignore-installed", "--no-deps", "--report", "-"]
    report = json.loads(_pip("install", *arguments, allowed[1]))
    return str(report["install"][0]["metadata"]["version"])


def folder_of(release: str) -> Path | None:
    """A folder with a release and what it needs besides this environment; None: it is here.

    It is installed once, and lies in this environment or in the user's cache. What it needs beyond
    transformers (an older huggingface_hub) is fixed by `constraints.txt`.

    Raises:
        Unavailable: it cannot be installed.
    """
    if release == NEWEST:
        release = newest_of_the_index()
    if release == INSTALLED:
        return None
    folder = _cache() / f"{release}-{sys.implementation.cache_tag}"
    if folder.is_dir() and not unmet(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".installing-") as name:
        made = Path(name) / "packages"
        wanted: list[str] = []
        missing = [f"transformers=={release}"]
        while missing:
            if missing == wanted:
                raise Unavailable(f"transformers {release} needs {', '.join(missing)}")
            wanted = missing
            _install(made, wanted)
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


def _install(folder: Path, packages: list[str]) -> None:
    # Without dependencies: pip would copy this environment's numpy and more into every folder.
    limits = ["--constraint", str(CONSTRAINTS)]
    _pip("install", "--no-deps", "--no-compile", *limits, "--target", str(folder), *packages)


def _cache() -> Path:
    """In a virtual environment, so that it goes with it; else the user's cache."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    if sys.prefix != sys.base_prefix:
        return Path(sys.prefix) / "transformers-matrix"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dattn-mcore/transformers-matrix"


def _pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip() or "pip failed").splitlines()[-1]
        raise Unavailable(f"{' '.join(arguments[-1:])} cannot be installed from the index ({last})")
    return done.stdout


def environment_of(folder: Path | None, home: Path) -> dict[str, str]:
    """The environment of a process that has a release and not this project.

    Args:
        folder: from `folder_of`.
        home: where transformers may keep what it makes.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME", "HF_MODULES_CACHE", "TRANSFORMERS_CACHE")
    }
    kept |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return kept | ({} if folder is None else {"PYTHONPATH": str(folder)})
