"""`pretrain_dattn.py` as a user types it: exit codes, one line for a mistake, the self-restart."""

import contextlib
import hashlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SMALL = [
    "train.steps=2",
    "train.global_batch_size=8",
    "log.interval=1",
    "log.tensorboard=false",
    "data.image_backend=pillow",
]


def run(*arguments, launcher=(sys.executable,), cwd=None, timeout=300):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    return subprocess.run(
        [*launcher, str(ROOT / "pretrain_dattn.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=timeout,
    )


TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["parallel.tpp=2"], "error: unknown configuration key 'parallel.tpp'"),
        (["--tp", "3"], "error: model.llm.num_query_groups=4, model.llm.num_attention_heads=4, "),
        (["--config", "nowhere.yaml"], "error: --config nowhere.yaml cannot be read"),
        (["--device", "tpu"], "error: train.device='tpu' is unknown"),
        (["--device", "gpu"], "error: train.device=gpu needs a GPU"),
    ],
)
def test_mistakes_give_one_line(arguments, message, tmp_path):
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_deterministic_run(workspace):
    """All of PyTorch is held to it before the first step, and no operation of a step refuses."""
    program = (
        "import sys, torch; from dattn_mcore.training.main import main; status = main(); "
        "print(torch.are_deterministic_algorithms_enabled()); sys.exit(status)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *SMALL, "train.deterministic=true", "data.prepare=none"],
        cwd=workspace,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == "True"


def test_wrong_process_count(tmp_path):
    result = run("--tp", "4", "--pp", "2", launcher=(*TORCHRUN, "--nproc-per-node", "3"))
    assert result.returncode != 0
    assert result.stderr.count("error: tp (4) x pp (2) needs a multiple of 8 processes, got 3") == 1


def test_dry_run_prints_layout_and_parameters(tmp_path):
    result = run("--tp", "2", "--pp", "2", "--dry-run", cwd=tmp_path)
    assert result.returncode == 0
    assert "layout: 4 processes = tp 2 x pp 2 x dp 1" in result.stdout
    assert "vision tower, projector, embedding, layers 0-1" in result.stdout
    assert not list(tmp_path.iterdir())


def test_missing_data_is_one_line_and_no_traceback(workspace):
    result = run("data.annotations=data/none.json", "data.prepare=none", cwd=workspace)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "data/none.json" in errors[0]
    assert "Traceback" not in result.stderr


def test_one_process_restarts_itself_under_eight(workspace):
    """`torchrun pretrain_dattn.py --tp 4 --pp 2`, typed literally."""
    result = run("--tp", "4", "--pp", "2", *SMALL, launcher=TORCHRUN, cwd=workspace, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "one process started and 8 needed: restarting as torchrun --nproc-per-node 8" in (
        result.stdout
    )
    assert "on 8 CPU processes, tp 4 x pp 2 x dp 1" in result.stdout
    rows = (workspace / "runs/digits_pretrain/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


def test_a_run_prints_what_matters_and_goes_on(workspace):
    result = run(*SMALL, cwd=workspace)
    assert result.returncode == 0, result.stderr[-2000:]
    line = next(li for li in result.stdout.splitlines() if li.startswith("step 2/2"))
    assert re.match(
        r"step 2/2  loss \d+\.\d{4}  lr \S+  grad \S+  \S+ samples/s  "
        r"\S+ text \+ \S+ visual tokens/s  ETA 0s",
        line,
    )
    assert result.stderr == ""
    run_dir = workspace / "runs/digits_pretrain"
    assert (run_dir / "config.yaml").exists()
    manifest = json.loads((run_dir / "checkpoints/step_00000002/dattn.json").read_text())
    assert manifest["config"]["train"]["steps"] == 2
    # An export finds the run's tokenizer from any folder, and knows it by its hash.
    tokenizer = workspace / "data/digits/tokenizer.model"
    sha256 = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    assert manifest["tokenizer"] == {"path": str(tokenizer), "fingerprint": sha256}
    again = run(*SMALL, "train.steps=3", cwd=workspace)
    assert "resumed at step 2 of 3" in again.stdout


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_signal_saves_and_exits_cleanly(workspace, number):
    """SIGUSR1, as Slurm sends it before the time limit; SIGINT, as Ctrl-C does; SIGHUP."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "pretrain_dattn.py"), *SMALL, "train.steps=100000"],
        cwd=workspace,
        env=environment,
        # A shell's background job, as tests may be, ignores Ctrl-C and passes that on.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stdout:
            if line.startswith("step "):
                break
        time.sleep(0.2)
        process.send_signal(number)
        rest = process.stdout.read()
        assert process.wait(120) == 0
    finally:
        process.kill()
    assert "stopped by a signal" in rest
    saved = list((workspace / "runs/digits_pretrain/checkpoints").iterdir())
    assert len(saved) == 1 and saved[0].suffix == ""


def test_a_closed_terminal_saves(workspace):
    """The kernel says SIGHUP, and nothing that the run says can be written any more."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(workspace)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        arguments = [sys.executable, str(ROOT / "pretrain_dattn.py"), *SMALL, "train.steps=100000"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        os.execve(sys.executable, arguments, environment)
    try:
        with os.fdopen(terminal, "r", errors="replace") as lines:
            for line in lines:
                if line.startswith("step "):
                    break
            else:
                pytest.fail("the run did no step")
        _, alive = psutil.wait_procs([psutil.Process(process)], timeout=120)
        assert not alive
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    (saved,) = (workspace / "runs/digits_pretrain/checkpoints").iterdir()
    assert (saved / "dattn.json").is_file() and saved.suffix == ""


def test_ranks_of_a_killed_torchrun_save_and_end(workspace):
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", str(ROOT / "pretrain_dattn.py")]
    launcher = subprocess.Popen(
        [*command, *SMALL, "train.steps=100000"],
        cwd=workspace,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    ranks = []
    try:
        for line in launcher.stdout:
            if line.startswith("step "):
                break
        ranks = psutil.Process(launcher.pid).children()
        launcher.kill()
        _, alive = psutil.wait_procs(ranks, timeout=120)
        assert len(ranks) == 2 and not alive
    finally:
        for process in (launcher, *ranks):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        launcher.wait()
    saved = list((workspace / "runs/digits_pretrain/checkpoints").iterdir())
    assert len(saved) == 1 and saved[0].suffix == ""
