"""With CI=true a skip for want of a package or of the index fails; without CI it is a skip."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = """
import pytest

@pytest.mark.skipif(True, reason="lmms-eval is not installed")
def test_mark(): pass

def test_call():
    pytest.skip("transformers==5.6.0 cannot be installed from the index (no route)")

@pytest.fixture
def browser(): pytest.skip("no Chromium to open the report with")

def test_fixture(browser): pass

@pytest.mark.skipif(True, reason="needs a GPU, and this machine has none")
def test_gpu(): pass

def test_files(): pytest.skip("no released LLaVA answers in /data; name them")

@pytest.mark.xfail(reason="is not installed", strict=True)
def test_xfail(): raise ValueError

def test_passes(): pass
"""


@pytest.mark.parametrize(
    ("ci", "status", "summary"),
    [
        # A skip before the test's own call is reported as an error.
        ("", 0, "1 passed, 6 skipped, 1 xfailed"),
        ("true", 1, "1 failed, 1 passed, 2 skipped, 1 xfailed, 3 errors"),
    ],
)
def test_skips(tmp_path, ci, status, summary):
    (tmp_path / "conftest.py").write_text(
        "from tests.ci_skips import pytest_make_collect_report, pytest_runtest_makereport\n"
    )
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('not_there')\n")
    environment = os.environ | {"CI": ci, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]
    command += ["--continue-on-collection-errors"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert summary in done.stdout
    assert done.stdout.count("which is a failure with CI=true") >= 4 * status


def test_the_hooks_are_installed(pytestconfig):
    """They judge this run, too."""
    import tests.conftest
    from tests import ci_skips

    hooks = ("pytest_runtest_makereport", "pytest_make_collect_report")
    assert all(getattr(tests.conftest, name) is getattr(ci_skips, name) for name in hooks)
