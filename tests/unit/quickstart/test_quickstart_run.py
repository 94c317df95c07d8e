"""Running steps: output is shown, a failure is one line, only own folders are removed."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from dattn_mcore.errors import DattnError
from dattn_mcore.quickstart.run import StepError, make_run_dir, run_step
from dattn_mcore.quickstart.steps import ROOT, Step


def _step(code: str) -> Step:
    return Step("sample", "a sample", (sys.executable, "-c", code), "python -c ...")


def _run(code: str, logs: Path) -> str:
    shown = io.StringIO()
    run_step(_step(code), logs, Console(file=shown, width=80))
    return shown.getvalue()


def test_what_a_step_says_is_shown_as_it_is(tmp_path):
    shown = _run("print('step 1/3  [bold]loss[/bold] ' + 'x' * 100)", tmp_path)
    assert shown == "   step 1/3  [bold]loss[/bold] " + "x" * 100 + "\n"


def test_warnings_go_to_the_log(tmp_path):
    shown = _run("import sys; print('shown'); sys.stderr.write('hidden')", tmp_path)
    assert "hidden" not in shown
    assert (tmp_path / "sample.log").read_text() == "hidden"


@pytest.mark.parametrize(
    ("stderr", "reported"),
    [
        ("Traceback\nerror: optim.lr=x is bad\nChildFailedError: rank 0\n", "optim.lr=x is bad"),
        ("Traceback\n  File\nValueError: no\n", "ValueError: no"),
        ("", "it said nothing"),
    ],
)
def test_a_failed_step_is_reported_in_one_line(tmp_path, stderr, reported):
    code = f"import sys; sys.stderr.write({stderr!r}); sys.exit(3)"
    with pytest.raises(StepError) as caught:
        _run(code, tmp_path)
    message = str(caught.value)
    assert reported in message
    assert "'sample' failed with status 3" in message
    assert str(tmp_path / "sample.log") in message
    assert "\n" not in message


def test_a_folder_that_no_quickstart_made_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DattnError, match="no folder of an earlier quickstart"):
        make_run_dir(tmp_path, {})
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_folder_of_an_earlier_quickstart_is_replaced(tmp_path):
    folder = tmp_path / "runs" / "quickstart"
    make_run_dir(folder, {"overrides": []})
    (folder / "answers.jsonl").write_text("old")
    make_run_dir(folder, {"overrides": []})
    assert not (folder / "answers.jsonl").exists()


def test_an_empty_folder_is_taken(tmp_path):
    make_run_dir(tmp_path, {})
    assert (tmp_path / "logs").is_dir()


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "dattn_mcore.quickstart", "--run-dir", str(tmp_path), "optim.lrr=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert (
        result.stderr == "error: unknown configuration key 'optim.lrr'; did you mean 'optim.lr'?\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_stopping_stops_the_step_too(tmp_path):
    """A step must not go on in the background after Ctrl-C."""
    pid_file = tmp_path / "pid"
    inner = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    outer = (
        "import sys, pathlib\n"
        "from rich.console import Console\n"
        "from dattn_mcore.quickstart.run import run_step\n"
        "from dattn_mcore.quickstart.steps import Step\n"
        f"run_step(Step('s', 's', (sys.executable, '-c', {inner!r}), ''),"
        f" pathlib.Path({str(tmp_path)!r}), Console())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", outer],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        # Where the tests run in the background SIGINT is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while not (pid_file.exists() and pid_file.read_text()):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) != 0
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid_file.read_text()), 0)
    finally:
        process.kill()
        process.wait()
