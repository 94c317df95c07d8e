"""Each tier runs its tests, and says what it leaves out and how to run it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiers

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CONFTEST = """
import pytest
from tests.tiers import (
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

@pytest.fixture
def pool():
    return None

@pytest.fixture
def trained(pool):
    return None
"""
FILES = {
    "tests/unit/test_one.py": "def test_a(): pass\ndef test_b(trained): pass\n",
    "tests/end_to_end/test_slurm.py": "def test_c(): pass\n",
    "tests/end_to_end/test_command_line.py": "def test_d(pool): pass\ndef test_e(): pass\n",
    "tests/unit/layers/test_triton_attention.py": "def test_f(): pass\n",
    "tests/unit/layers/test_triton_compiles.py": "def test_g(): pass\n",
}


@pytest.fixture
def run(tmp_path):
    """Runs small tests that stand where ours stand."""
    for name, text in {"conftest.py": CONFTEST, **FILES}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def call(*arguments):
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        passed = re.findall(r"PASSED \S+::test_(\w)|::test_(\w) PASSED", done.stdout)
        return "".join(sorted(map("".join, passed))), done.stdout

    return call


def test_a_tier_leaves_tests_out_and_says_so(run):
    ran, output = run("--tier", "fast")
    assert ran == "a"
    assert "make test-fast leaves out 6 tests:\n" in output
    assert "      2  pool: runs in a pool of processes" in output
    assert "      3  processes: starts processes" in output and "      1  slow: " in output
    assert "      2  interpreter: " in output and "      1  slurm: " in output
    assert "make test runs 4 of them, make test-all runs 6 of them\n" in output
    ran, in_two = run("--tier", "fast", "-n", "2")
    assert ran == "a"
    for line in output.partition("make test-fast leaves out")[2].splitlines()[:-1]:
        assert line in in_two

    ran, output = run("--tier", "default")
    assert ran == "abdef"
    assert "make test leaves out 2 tests:\n      1  slurm: " in output
    assert "make test-all runs 2 of them\n" in output

    assert run("--tier", "all", "--part", "together")[0] == "abdefg"
    assert run("--tier", "all", "--part", "alone")[0] == "c"
    assert run("--tier", "fast", "-k", "test_c")[0] == ""  # which is no failure
    for arguments in (("--tier", "all"), ()):
        ran, output = run(*arguments)
        assert ran == "abcdefg" and "leaves out" not in output
    assert run("-m", "pool")[0] == "bd"


def test_every_place_has_tests():
    for place in [*tiers.BY_PLACE, *tiers.SLOW]:
        path, _, test = place.partition("::")
        assert (ROOT / path).exists(), path
        if test:
            test = test.partition("[")[0]
            assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), place
    given = {*tiers.BY_PLACE.values(), *tiers.BY_FIXTURE.values(), "slow"}
    assert given == set(tiers.MARKERS)


def test_every_tier_has_its_command():
    for tier, command in tiers.COMMANDS.items():
        target = command.removeprefix("make ")
        lines = rf"^{target}:.*\n\t.*--tier {tier} \$\(ALL_CORES\)"
        if tier == "all":
            together = rf".*--tier {tier} --part together \$\(ALL_CORES\).*"
            lines = rf"^{target}:.*\n\t{together}\n\t.*--tier {tier} --part alone "
        assert re.search(lines, MAKEFILE, re.MULTILINE), command
    assert tiers.LEFT_OUT["fast"] > tiers.LEFT_OUT["default"] > tiers.LEFT_OUT["all"] == set()
