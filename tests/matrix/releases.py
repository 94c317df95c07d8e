"""The releases of transformers that exports are held to, each in a folder of its own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
from pathlib import Path

from packaging.version import Version

from dattn_mcore.hf import TESTED_TRANSFORMERS
from tests.installed import cache, folder_with, pip

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
# Where they begin, releases need a newer Python than this project.
NEEDS_PYTHON = (Version("5.21"), (3, 11))
NO_PYTHON = "transformers 5.21 and later need Python 3.11"


def releases() -> list[str]:
    """Releases of the matrix that this Python can run, oldest first.

    At the end stands `NEWEST`, where it is asked for.
    """
    found = {*TESTED_TRANSFORMERS, INSTALLED}
    found.update(release for pair in CHANGES.values() for release in pair)
    ordered = sorted({_patch(release) for release in found}, key=Version)
    first, python = NEEDS_PYTHON
    if sys.version_info < python:
        ordered = [release for release in ordered if Version(release) < first]
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
    report = json.loads(pip("install", *arguments, allowed[1]))
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
    folder = cache("transformers-matrix", FOLDER_VARIABLE)
    folder /= f"{release}-{sys.implementation.cache_tag}"
    return folder_with([f"transformers=={release}"], folder, CONSTRAINTS)


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
