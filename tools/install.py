"""Installs this package into the environment whose Python runs this: `python -m tools.install`.

    python -m tools.install               what training, conversion and evaluation need
    python -m tools.install --dev         and the tools for tests
    python -m tools.install --newest      the newest versions that pyproject.toml allows
    python -m tools.install --dry-run     prints what would be installed, and installs nothing

Without `--newest` every package gets the version that constraints.txt names. A build of PyTorch
that is installed already, within the range of pyproject.toml, stays: constraints-torch.txt is then
not applied. Needs nothing but Python's standard library and pip.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dattn_mcore.console import complain, say

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
TORCH_CONSTRAINTS = ROOT / "constraints-torch.txt"
# Holds the version of PyTorch that came from constraints-torch.txt, which may be replaced.
TORCH_RECORD = Path(sys.prefix) / "torch-from-constraints"
LOG = Path(sys.prefix) / "pip.log"

# lmms-eval comes without its dependencies: some clash with ours, and most serve other models.
# The extra `dev` has those that it needs for tasks of images and text.
_WITHOUT_DEPENDENCIES = "lmms-eval>=0.7.3,<0.8"
_UNREACHABLE = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeoutError|ReadTimeout|Read timed out|"
    r"ProxyError|SSLError|Network is unreachable|Max retries exceeded|Connection refused|"
    r"connection error|name resolution|Name or service not known|"
    r"Connection (?:broken|reset|aborted)"
)


class InstallError(Exception):
    """What went wrong and the way out, in one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.install", description="Install.")
    parser.add_argument("--dev", action="store_true", help="the tools for tests too")
    parser.add_argument("--newest", action="store_true", help="the newest versions, not the locked")
    parser.add_argument("--dry-run", action="store_true", help="print what would be installed")
    chosen = parser.parse_args(arguments)
    try:
        install(dev=chosen.dev, newest=chosen.newest, dry_run=chosen.dry_run)
    except InstallError as error:
        complain(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130
    return 0


def install(*, dev: bool = False, newest: bool = False, dry_run: bool = False) -> None:
    """Installs the package, editable, with what it needs.

    Args:
        dev: with the tools for tests.
        newest: the newest versions that are allowed, instead of those of the constraints files.
        dry_run: print what would be installed; install nothing.

    Raises:
        InstallError: pip failed.
    """
    package = f"{ROOT}[dali,dev]" if dev else f"{ROOT}[dali]"
    add = _print_what_is_missing if dry_run else _install
    if newest:
        add("--upgrade", "--upgrade-strategy", "eager", "--editable", package)
        if dev:
            add("--upgrade", "--no-deps", _WITHOUT_DEPENDENCIES)
        return
    constraints = ["--constraint", str(CONSTRAINTS)]
    add("setuptools", *constraints)  # pip's own build environments know no constraints
    present = installed("torch")
    stays = torch_stays(present)
    torch = [f"torch=={present}"] if stays else ["--constraint", str(TORCH_CONSTRAINTS)]
    isolation = [] if dry_run else ["--no-build-isolation"]  # a dry run installs no setuptools
    add(*isolation, "--editable", package, *constraints, *torch)
    if not stays and not dry_run:
        TORCH_RECORD.write_text(f"{installed('torch')}\n")
    if dev:
        add("--no-deps", _WITHOUT_DEPENDENCIES, *constraints)


def _install(*arguments: str) -> None:
    pip("install", *arguments)


def _print_what_is_missing(*arguments: str) -> None:
    for package in would_install(*arguments):
        say(package)


def would_install(*arguments: str) -> list[str]:
    """What `pip install` with these arguments would install: `name==version` each."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"  # standard output has pip's messages
        pip("install", "--dry-run", "--report", str(report), *arguments)
        packages = [package["metadata"] for package in json.loads(report.read_text())["install"]]
    return [f"{package['name']}=={package['version']}" for package in packages]


def torch_stays(present: str | None) -> bool:
    """Whether the environment's PyTorch was chosen by somebody else, and is one that will do."""
    if present is None:
        return False
    if TORCH_RECORD.is_file() and TORCH_RECORD.read_text().strip() == present:
        return False
    allowed = torch_range()
    # pip's own answer: it would install nothing.
    stays = not would_install("--no-deps", allowed)
    what = "stays" if stays else f"is replaced, {allowed} is needed"
    say(f"PyTorch {present} is installed already and {what}")
    sys.stdout.flush()
    return stays


def torch_range() -> str:
    """`torch>=A,<B`, as pyproject.toml says (Python 3.10 has no reader for TOML)."""
    (found,) = re.findall(r'^    "(torch[<>=][^"]*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    return str(found)


def installed(name: str) -> str | None:
    """Version of a distribution in this environment."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def pip(command: str, *arguments: str) -> None:
    """Runs pip.

    Raises:
        InstallError: with the reason in one line.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check"]
        + ["--no-input", "--progress-bar", "off", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        output = (done.stdout + done.stderr).strip()
        LOG.write_text(f"{output}\n")
        raise InstallError(f"{reason(output)}; pip's messages are in {LOG}")


def reason(output: str) -> str:
    """What pip's messages come to."""
    if _UNREACHABLE.search(output):
        return (
            "the package index cannot be reached; check the network and pip's settings "
            "(pip config list), then give the same command again"
        )
    errors = re.findall(r"^(?:ERROR|error): (?!Exception)(.+)$", output, re.MULTILINE)
    lines = errors[:1] or output.split("\n")[-1:]
    return f"pip failed: {lines[0] or 'without a message'}"


if __name__ == "__main__":
    sys.exit(main())
