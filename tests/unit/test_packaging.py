"""Metadata, Makefile and README say what is there."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from setuptools import find_namespace_packages

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _list(name: str) -> list[str]:
    """A list of strings in pyproject.toml (Python 3.10 has no reader for TOML)."""
    block = re.search(rf"^{name} = \[(.*?)^\]", PROJECT, re.MULTILINE | re.DOTALL)
    assert block, name
    return re.findall(r'"([^"]+)"', block[1])


def test_the_extras_are_these():
    block = PROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = re.findall(r"^(\w+) = \[", block, re.MULTILINE)
    assert extras == [
        "dali",
        "parquet",
        "heif",
        "video",
        "trackers",
        "adapters",
        "te",
        "flash",
        "triton",
        "eval",
        "dev",
    ]


def test_everything_that_is_imported_is_asked_for():
    asked = {re.split(r"[\[<>=; ]", entry)[0].lower() for entry in _list("dependencies")}
    for extra in ("eval", "trackers"):
        asked |= {re.split(r"[><=]", entry)[0] for entry in _list(extra)}
    asked |= {"peft"}  # an extra of one entry
    asked |= {"nvidia-dali-" + "cu" + "da120"}  # an extra; Pillow decodes without it
    asked |= {"transformer-engine"}  # an extra; the local linears do without it
    asked |= {"triton"}  # an extra; other attention backends do without it
    asked |= {"lmms-eval", "lmms_eval"}  # imports its plug-in, which imports it
    distributions = packages_distributions()
    missing = set()
    files = [*(ROOT / "dattn_mcore").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            for name in {name.split(".")[0] for name in names}:
                if name in sys.stdlib_module_names or name in ("dattn_mcore", "tools"):
                    continue
                found = {dist.lower().replace("_", "-") for dist in distributions.get(name, [name])}
                if not found & {entry.replace("_", "-") for entry in asked}:
                    missing.add(f"{path.relative_to(ROOT)}: {name}")
    assert len(files) > 50
    assert not missing


ALL_CORES = "-n logical --maxprocesses 8 --dist worksteal"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("target", "ends_with"),
    [
        ("quickstart", ".venv/bin/python -m dattn_mcore.quickstart optim.lr=1"),
        ("test-fast", f".venv/bin/python -m pytest -q --tier fast {ALL_CORES} optim.lr=1"),
        ("test", f".venv/bin/python -m pytest -q --tier default {ALL_CORES} optim.lr=1"),
        ("test-all", ".venv/bin/python -m pytest -q --tier all --part alone optim.lr=1"),
        ("check", ".venv/bin/mypy"),
        ("update", ".venv/bin/python -m pytest -q tests/matrix"),
        ("test-newest", ".venv-newest/bin/python -m pytest -q --tier all --part alone optim.lr=1"),
        ("quickstart-newest", ".venv-newest/bin/python -m dattn_mcore.quickstart optim.lr=1"),
    ],
)
def test_a_fresh_clone_installs_and_then_runs(target, ends_with, clone):
    done = clone("--dry-run", target, "ARGS=optim.lr=1")
    lines = [line for line in done.stdout.splitlines() if not line.startswith("make")]
    assert lines[-1].strip().endswith(ends_with)
    installs = [line for line in lines if "tools.install" in line]
    environment = ".venv-newest" if "newest" in target else ".venv"
    assert installs and all(line.startswith(f"{environment}/bin/python") for line in installs)
    assert all("--newest" in line for line in installs) == ("newest" in target)
    assert "http" not in done.stdout  # the user's own package index is used


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("complete", [False, True])
def test_the_check_of_a_gpu_installs_nothing(complete, clone):
    """It takes .venv where that is complete, else the Python that is there."""
    stamp = clone.folder / ".venv" / "installed-dev"
    stamp.parent.mkdir()
    if complete:
        stamp.touch()
    done = clone("--dry-run", "gpu-check", "ARGS=--minutes 8", "PYTHON=python3.12")
    python = ".venv/bin/python" if complete else "python3.12"
    assert done.stdout.splitlines() == [f"{python} -m benchmarks.gpu_check --minutes 8"]


@pytest.fixture
def clone(tmp_path):
    """The files that say what is installed; calls make among them."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "constraints-torch.txt"):
        shutil.copy(ROOT / name, tmp_path)

    def make(*arguments):
        return subprocess.run(
            ["make", *arguments],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
        )

    make.folder = tmp_path
    return make


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt", "constraints-torch.txt"])
def test_an_older_environment_is_brought_up_to_date(changed, clone):
    stamps = [clone.folder / ".venv" / name for name in ("bin/pip", "installed", "installed-dev")]
    for age, stamp in enumerate(reversed(stamps)):
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
        os.utime(stamp, (2e9 - age, 2e9 - age))
    assert "tools.install" not in clone("--dry-run", "test").stdout
    os.utime(clone.folder / changed, (2.1e9, 2.1e9))
    ran = [line for line in clone("--dry-run", "test").stdout.splitlines() if "install" in line]
    assert ".venv/bin/python -m tools.install" in ran
    assert ".venv/bin/python -m tools.install --dev" in ran


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_wrong_python_is_one_line(clone):
    old = clone.folder / "python2"
    old.write_text("#!/bin/sh\n[ $1 = --version ] || exit 1\necho Python 2.7.18\n")
    old.chmod(0o755)
    for python, found in ((old, "Python 2.7.18"), ("no-such-python", "not a command")):
        done = clone("test", f"PYTHON={python}")
        first, _make_s_own = done.stderr.strip().split("\n")
        assert done.returncode == 2 and done.stdout == ""
        assert first == (
            f"error: Python 3.10, 3.11 or 3.12 is needed, and {python} is {found}; "
            "run make PYTHON=python3.11 ..."
        )
        assert not (clone.folder / ".venv").exists()


def test_the_converter_is_installed_and_other_tools_are_not():
    (listed,) = re.findall(
        r"^\[tool\.setuptools\.packages\.find\]\n(?:#.*\n)*include = (.*)$", PROJECT, re.M
    )
    found = find_namespace_packages(str(ROOT), include=ast.literal_eval(listed))
    outside = {name for name in found if name.split(".")[0] != "dattn_mcore"}
    assert outside == {"tools.checkpoint_convert"}
    # What it imports is installed as well.
    for path in (ROOT / "tools/checkpoint_convert").glob("*.py"):
        for name in re.findall(r"(?:from|import) (tools[\w.]*)", path.read_text(encoding="utf-8")):
            assert name.startswith("tools.checkpoint_convert"), f"{path}: {name}"


def test_setup_py_builds_on_the_metadata():
    version = subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert version.stdout.split()[-1] == "dattn-mcore"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    for target in re.findall(r"(?:`|^    )make ([\w-]+)", text, re.MULTILINE):
        assert target in targets, target
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module), module
    for path in re.findall(r"(?<![\w/.])(?:configs|docs|tools|dattn_mcore)/[\w/.-]+\w", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link


def test_the_readme_opens_with_the_two_commands():
    places = [README.index(text) for text in ("make quickstart", "make test", "## How")]
    assert places == sorted(places)


def test_the_configuration_page_is_up_to_date():
    from tools.configuration_page import PAGE, render

    page = render()
    assert "|  |" not in page, "a setting without a meaning"
    assert PAGE.read_text(encoding="utf-8") == page, "run python -m tools.configuration_page"
