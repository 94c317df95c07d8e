"""Two processes, killed half-way and resumed by torchrun, against one undisturbed process."""

import os
import subprocess
import sys
import time

import psutil

from dattn_mcore.evaluation.__main__ import main
from dattn_mcore.evaluation.benchmarks.gqa import Gqa
from dattn_mcore.evaluation.benchmarks.pope import Pope
from tests.ranks import end_ranks, free_port, start_ranks
from tests.unit.evaluation.conftest import ROOT
from tests.unit.evaluation.tiny_runs import answers, scores


def arguments(world, out, *more):
    """Of a run over all benchmarks."""
    return [
        "run",
        f"--model={world / 'tiny'}",
        f"--data={world / 'val'}",
        f"--out={out}",
        "--max-new-tokens=6",
        "--device=cpu",
        *more,
    ]


def torchrun(world, out):
    """Starts the command on two processes as a user does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    command += ["-m", "dattn_mcore.evaluation", *arguments(world, out, "--batch-size=1")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (out.parent / f"{out.name}.log").open("a") as log:
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


def test_killed_half_way_and_resumed(whole, tiny_model, tmp_path):
    """What was answered stays as it was, the rest is added, nothing differs from one process."""
    out = tmp_path / "two"
    own = (arguments(tiny_model, out, "--batch-size=1"),)
    ranks = start_ranks(main, [own, own], tmp_path)
    try:
        deadline = time.monotonic() + 240
        while answered(out) < 12 or len({part.name for part in parts(out)}) < 2:
            assert all(rank.is_alive() for rank in ranks), (tmp_path / "rank0.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        end_ranks(ranks)
    before = {path: path.read_bytes().split(b"\n")[:-1] for path in parts(out)}
    assert len({path.name for path in before}) == 2, "both processes answered"
    assert 12 <= sum(map(len, before.values())) < 38, "it was killed half-way"
    assert not (out / "scores.json").exists()

    resumed = torchrun(tiny_model, out)
    try:
        assert resumed.wait(timeout=300) == 0, (tmp_path / "two.log").read_text()
    finally:
        if resumed.poll() is None:
            kill(resumed)
    assert answers(out) == answers(whole)
    two, one = scores(out), scores(whole)
    assert two["run"]["decoding"]["processes"] == 2
    for name, entry in one["benchmarks"].items():
        for key in ("status", "value", "figures", "categories"):
            assert two["benchmarks"][name].get(key) == entry.get(key)
    # The lines of before the kill are those of the result, to the byte: none was answered again.
    kept_whole = {p.stem: p.read_bytes().split(b"\n") for p in (out / "answers").glob("*.jsonl")}
    for path, kept in before.items():
        assert set(kept) <= set(kept_whole[path.parent.name])
    log = (tmp_path / "two.log").read_text()
    assert "answered before" in log


def with_a_defect(broken, command) -> int:
    """Runs a command in which reading one benchmark's questions is broken."""

    def raises(benchmark):
        raise TypeError("a defect")

    broken.load_rows = raises
    return main(command)


def test_a_defect_on_one_process_costs_one_benchmark(tiny_model, tmp_path):
    """The other process does not wait for it, and both go on with the next benchmark."""
    out, names = tmp_path / "out", "--benchmarks=gqa,pope,vizwiz,mmstar"
    command = arguments(tiny_model, out, "--batch-size=4", names)
    ranks = start_ranks(with_a_defect, [(Pope, command), (Gqa, command)], tmp_path)
    try:
        for rank in ranks:
            rank.join(240)
        assert [rank.exitcode for rank in ranks] == [1, 0], (tmp_path / "rank0.log").read_text()
    finally:
        end_ranks(ranks)
    found = scores(out)["benchmarks"]
    for name, rank in (("gqa", 1), ("pope", 0)):
        log = out / f"errors-{rank}.log"
        assert found[name]["error"] == f"internal error: TypeError: a defect; see {log}"
        assert log.read_text().startswith(f"{name}\nTraceback")
    assert (found["vizwiz"]["status"], found["mmstar"]["status"]) == ("submission", "scored")
