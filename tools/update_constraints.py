"""Resolves constraints.txt and constraints-torch.txt anew: `python -m tools.update_constraints`.

Each file names one exact version a package, with markers where Python versions differ, for Linux
and every Python that pyproject.toml allows. `uv pip compile --universal` chooses the newest
versions that the ranges in pyproject.toml allow together.

PyTorch, and what only PyTorch brings (Triton, the CUDA libraries), stand in the second file:
`tools.install` does not apply it where another build of PyTorch is installed already.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from dattn_mcore.console import complain

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
TORCH_CONSTRAINTS = ROOT / "constraints-torch.txt"
EXTRAS = (
    "dali",
    "parquet",
    "heif",
    "video",
    "trackers",
    "adapters",
    "triton",
    "eval",
    "dev",
)  # te and flash are built on GPU machines
OLDEST_PYTHON = "3.10"
LMMS_EVAL = "lmms-eval>=0.7.3,<0.8"  # installed without its dependencies

_PYTORCHS_OWN = re.compile(r"(torch|triton|(nvidia|cuda)-.*)==")
_NAME = re.compile(r"[^=]+(?===)")
# True wherever the files are used; the resolver repeats them on every line.
_ALWAYS = (r"python_full_version < '3\.13'", r"sys_platform == 'linux'")
_HEADER = """# {purpose}
# Written by `make update` from the ranges in pyproject.toml; not to be edited.
"""


class ResolveError(Exception):
    """The resolver found no versions, or could not run."""


def main() -> int:
    """Writes both files; returns the exit status."""
    try:
        pins = resolve(["pyproject.toml", *(f"--extra={extra}" for extra in EXTRAS)])
        (torch_range,) = re.findall(r'"(torch[>=<][^"]+)"', (ROOT / "pyproject.toml").read_text())
        of_torch = {_name(pin) for pin in resolve(["-"], torch_range)}
        alone = resolve(["-", "--no-deps"], LMMS_EVAL)
        second = [pin for pin in pins if _PYTORCHS_OWN.match(pin) and _name(pin) in of_torch]
        first = [pin for pin in pins if pin not in second]
        # An older PyTorch that is installed already stays beside what the first file names.
        oldest = re.sub(r"torch>=([\d.]+).*", r"torch==\1.*", torch_range)
        resolve(["-"], "\n".join([*first, oldest]))
        first = sorted([*first, *alone])
    except ResolveError as error:
        complain(f"error: {error}")
        return 1
    _write(CONSTRAINTS, "Exact versions of everything that is installed, except PyTorch's.", first)
    _write(TORCH_CONSTRAINTS, "PyTorch, and what only PyTorch brings.", second)
    return 0


def resolve(arguments: list[str], requirements: str = "") -> list[str]:
    """Lines of `name==version ; marker`, the newest that are possible.

    Args:
        arguments: of `uv pip compile`; `-` reads the requirements.
        requirements: for `-`.

    Raises:
        ResolveError: with the resolver's last line.
    """
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal"]
    command += ["--python-version", OLDEST_PYTHON, "--no-python-downloads"]
    command += ["--only-binary", ":all:", "--no-header", "--no-annotate", *arguments]
    done = subprocess.run(command, cwd=ROOT, input=requirements, capture_output=True, text=True)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise ResolveError(
            f"uv found no versions for {arguments[0]} {requirements}: {' '.join(lines)[:600]}"
        )
    return [shorter(line) for line in done.stdout.splitlines() if line]


def shorter(line: str) -> str:
    """Leaves out the conditions that hold wherever the files are used."""
    for condition in _ALWAYS:
        line = re.sub(rf" and {condition}|{condition} and | ; {condition}$", "", line)
    return line


def _name(pin: str) -> str:
    found = _NAME.match(pin)
    assert found, pin
    return found[0]


def _write(path: Path, purpose: str, pins: list[str]) -> None:
    path.write_text(_HEADER.format(purpose=purpose) + "".join(f"{pin}\n" for pin in pins))


if __name__ == "__main__":
    sys.exit(main())
