"""Transformer Engine's own Python code, each release in a folder of its own, without its kernels.

The package of that name in the index holds the Python code of every framework; what is compiled comes
in others (transformer-engine-torch, transformer-engine-cu13), which `compiled_module` stands in for.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

from tests.installed import cache, folder_with, pip

ROOT = Path(__file__).parents[2]
CONSTRAINTS = Path(__file__).with_name("constraints.txt")
FOLDER_VARIABLE = "DATTN_TE_FOLDER"  # where releases are installed
# Set to 1, the newest release that the index has and pyproject.toml allows is tested as well.
NEWEST_VARIABLE = "DATTN_TE_NEWEST"
NEWEST = "newest of the index"
BESIDE = ("einops",)  # which transformer-engine-torch asks for
# The lower bound of pyproject.toml, and the newest release when this was written.
TESTED = ("2.8.0", "2.20.2")
NEWEST_TESTED = TESTED[-1]


def releases() -> list[str]:
    """Releases that are tested, oldest first; at the end `NEWEST`, where it is asked for."""
    return [*TESTED, *[NEWEST] * (os.environ.get(NEWEST_VARIABLE) == "1")]


def requirement() -> str:
    """What pyproject.toml allows, without the extra that is compiled."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    allowed = re.search(r'"transformer-engine\[pytorch\]([^"]*)"', text)
    assert allowed is not None, "pyproject.toml names no transformer-engine"
    return f"transformer-engine{allowed[1]}"


def newest_of_the_index() -> str:
    """The newest release that pyproject.toml allows.

    Raises:
        Unavailable: the index cannot be reached.
    """
    arguments = ["--dry-run", "--ignore-installed", "--no-deps", "--report", "-"]
    report = json.loads(pip("install", *arguments, requirement()))
    return str(report["install"][0]["metadata"]["version"])


def folder_of(release: str) -> Path:
    """A folder with a release; it is installed once, beside this environment.

    Raises:
        Unavailable: it cannot be installed.
    """
    if release == NEWEST:
        release = newest_of_the_index()
    packages = [f"transformer-engine=={release}", *BESIDE]
    return folder_with(packages, _place(release), CONSTRAINTS)


def is_here(release: str) -> bool:
    """Whether a release is installed, so that no index is asked."""
    return release != NEWEST and _place(release).is_dir()


def _place(release: str) -> Path:
    return (
        cache("transformer-engine", FOLDER_VARIABLE) / f"{release}-{sys.implementation.cache_tag}"
    )
