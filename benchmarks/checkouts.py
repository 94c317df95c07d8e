"""A commit of this repository in a folder of its own, for a while."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import ROOT, commit
from dattn_mcore.errors import ConfigError

WORKING_TREE = "."


@dataclass(frozen=True)
class Checkout:
    """A commit that can be run.

    Attributes:
        name: what was asked for, and the commit that it is.
        folder: of its code.
    """

    name: str
    folder: Path


@contextmanager
def checked_out(name: str, folder: Path, repository: Path = ROOT) -> Iterator[Checkout]:
    """A commit in a worktree, which is removed at the end.

    Args:
        name: commit, branch or tag; `.` is the repository's folder as it is.
        folder: of the worktree.
        repository: whose commit it is.

    Raises:
        ConfigError: there is no such commit, git cannot check it out, or its code is not the one
            that Python finds in its folder.
    """
    if name == WORKING_TREE:
        checkout = Checkout(f"the working tree ({commit(repository)})", repository)
        _check_code(checkout)
        yield checkout
        return
    try:
        found = _git(repository, "rev-parse", "--short", "--verify", f"{name}^{{commit}}")
    except ConfigError as error:
        raise ConfigError(
            f"{name!r} is no commit, branch or tag of {repository} ({error}); "
            "git log --oneline lists the commits"
        ) from None
    _git(repository, "worktree", "add", "--quiet", "--detach", str(folder), found)
    try:
        checkout = Checkout(name if name == found else f"{name} ({found})", folder)
        _check_code(checkout)
        yield checkout
    finally:
        _git(repository, "worktree", "remove", "--force", str(folder))


def _git(repository: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repository), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"git cannot be started ({error.strerror})") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise ConfigError(f"git {arguments[0]}: {said[0].removeprefix('fatal: ')}")
    return done.stdout.strip()


def _check_code(checkout: Checkout) -> None:
    """An installed package instead of the checkout's would make any two commits equal."""
    command = [sys.executable, "-c", "import dattn_mcore; print(dattn_mcore.__file__)"]
    done = subprocess.run(command, cwd=checkout.folder, capture_output=True, text=True, check=False)
    found = done.stdout.strip() or (done.stderr.strip().splitlines() or ["nothing"])[-1]
    if checkout.folder.resolve() not in Path(found).resolve().parents:
        raise ConfigError(
            f"{checkout.name}: in its folder Python does not find its dattn_mcore ({found}); "
            "choose a commit that has one, and unset PYTHONSAFEPATH"
        )
