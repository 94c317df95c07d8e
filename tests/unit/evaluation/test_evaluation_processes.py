"""Two processes by torchrun, killed half-way and resumed, against one undisturbed process."""

import os
import socket
import subprocess
import sys
import time

import psutil

from tests.unit.evaluation.conftest import ROOT
from tests.unit.evaluation.test_evaluation_run import answers, run, scores


def torchrun(world, out, program=("-m", "dattn_mcore.evaluation"), more=("--batch-size=1",)):
    """Starts a run over all benchmarks on two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A port that was free a moment ago: runs of other tests do not meet on torchrun's default.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    command += [*program, "run", f"--model={world / 'tiny'}"]
    command += [f"--data={world / 'val'}", f"--out={out}", "--max-new-tokens=6"]
    command += ["--device=cpu", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    log = (out.parent / f"{out.name}.log").open("a")
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT)


def kill(process) -> None:
    """Kills torchrun and its workers, which are in sessions of their own, as Slurm does."""
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    for member in family:
        member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=60)


def parts(out) -> list:
    """Files of answers, of which each process writes its own."""
    return list((out / "answers/parts").rglob("*.jsonl"))


def answered(out) -> int:
    return sum(path.read_bytes().count(b"\n") for path in parts(out))


def test_killed_half_way_and_resumed(tiny_model, tmp_path):
    """What was answered stays as it was, the rest is added, nothing differs from one process."""
    out = tmp_path / "two"
    process = torchrun(tiny_model, out)
    try:
        deadline = time.monotonic() + 240
        while answered(out) < 12 or len({part.name for part in parts(out)}) < 2:
            assert process.poll() is None, (tmp_path / "two.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        kill(process)
    before = {path: path.read_bytes().split(b"\n")[:-1] for path in parts(out)}
    assert len({path.name for path in before}) == 2, "both processes answered"
    assert 12 <= sum(map(len, before.values())) < 38, "it was killed half-way"
    assert not (out / "scores.json").exists()

    resumed = torchrun(tiny_model, out)
    assert resumed.wait(timeout=300) == 0, (tmp_path / "two.log").read_text()
    assert run(tiny_model, tmp_path / "one") == 0
    assert answers(out) == answers(tmp_path / "one")
    two, one = scores(out), scores(tmp_path / "one")
    assert two["run"]["decoding"]["processes"] == 2
    for name, entry in one["benchmarks"].items():
        for key in ("status", "value", "figures", "categories"):
            assert two["benchmarks"][name].get(key) == entry.get(key)
    # The lines of before the kill are those of the result, to the byte: none was answered again.
    whole = {p.stem: p.read_bytes().split(b"\n") for p in (out / "answers").glob("*.jsonl")}
    for path, kept in before.items():
        assert set(kept) <= set(whole[path.parent.name])
    log = (tmp_path / "two.log").read_text()
    assert "answered before" in log


BROKEN = """
import os, sys
from dattn_mcore.evaluation.__main__ import main
from dattn_mcore.evaluation.run import Share

answer = Share._answer

def broken(share):
    if (share.benchmark.name, os.environ["RANK"]) in (("gqa", "1"), ("pope", "0")):
        raise TypeError("a defect")
    answer(share)

Share._answer = broken
sys.exit(main())
"""


def test_a_defect_on_one_process_costs_one_benchmark(tiny_model, tmp_path):
    """The other process does not wait for it, and both go on with the next benchmark."""
    (tmp_path / "broken.py").write_text(BROKEN)
    out, names = tmp_path / "out", "--benchmarks=gqa,pope,vizwiz,mmstar"
    process = torchrun(tiny_model, out, [str(tmp_path / "broken.py")], ["--batch-size=4", names])
    try:
        assert process.wait(timeout=240) == 1
    finally:
        if process.poll() is None:
            kill(process)
    found = scores(out)["benchmarks"]
    for name, rank in (("gqa", 1), ("pope", 0)):
        log = out / f"errors-{rank}.log"
        assert found[name]["error"] == f"internal error: TypeError: a defect; see {log}"
        assert log.read_text().startswith(f"{name}\nTraceback")
    assert (found["vizwiz"]["status"], found["mmstar"]["status"]) == ("submission", "scored")
