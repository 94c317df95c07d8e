"""The console command `dattn` as it is installed: alone, under torchrun, and from any folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = [
    "train.steps=2",
    "train.global_batch_size=8",
    "log.interval=1",
    "log.tensorboard=false",
    "data.image_backend=pillow",
    "--device",
    "cpu",
]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# What pip writes for a console command.
SCRIPT = f"""#!{sys.executable}
import sys
from dattn_mcore.cli import main
if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture
def run(workspace):
    """Runs a command in a folder without code, where `dattn` is on PATH."""
    program = workspace / "bin" / "dattn"
    program.parent.mkdir()
    program.write_text(SCRIPT)
    program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)

    def call(*command):
        return subprocess.run(
            command, cwd=workspace, env=environment, capture_output=True, text=True, timeout=300
        )

    return call


def test_help_imports_nothing_heavy(run):
    code = (
        "import sys; from dattn_mcore.cli import main; status = main(['--help']); "
        "sys.exit(status or ' '.join({'torch', 'numpy', 'rich', 'yaml'} & set(sys.modules)) or 0)"
    )
    done = run(sys.executable, "-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run("dattn", "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "error: dattn has no command 'trian'; did you mean dattn train?\n"),
        (["train", "parallel.tpp=2"], "error: unknown configuration key 'parallel.tpp'"),
        (["plan", "--nodes", "0"], "error: --nodes 0 must be at least 1\n"),
        (["convert", "inspect", "nowhere"], "error: "),
        (["evaluate", "check", "--data", "nowhere"], "error: "),
        (["data", "check", "--config", "nowhere.yaml"], "error: --config nowhere.yaml cannot be"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, said):
    done = run("dattn", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1


def test_trains_under_torchrun_alone_and_with_a_restart(run, workspace):
    done = run(*TORCHRUN, "--no-python", "dattn", "train", *SMALL)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "on 2 CPU processes, tp 1 x pp 1 x dp 2" in done.stdout

    done = run("dattn", "train", *SMALL, "train.steps=3")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed at step 2 of 3" in done.stdout and done.stderr == ""

    done = run("dattn", "train", *SMALL, "train.steps=4", "--tp", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    restart = "restarting as torchrun --nproc-per-node 2 -m dattn_mcore.cli train train.steps=2"
    assert restart in done.stdout
    assert "on 2 CPU processes, tp 2 x pp 1 x dp 1" in done.stdout
    rows = (workspace / "runs/digits_pretrain/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4]

    done = run("dattn", "convert", "mcore-to-hf", "runs/digits_pretrain", "hf", "--processes", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    done = run("dattn", "convert", "verify", "runs/digits_pretrain", "hf")
    assert done.returncode == 0 and "equal to the last bit" in done.stdout
