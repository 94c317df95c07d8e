"""Runs killed without warning where they do not train: in a validation pass, in an export."""

import signal
import time

import psutil

from tests.distributed.faults import start_ranks
from tests.distributed.jobs import read_metrics, run_training
from tests.distributed.small_models import small_config
from tests.distributed.test_exports import files
from tests.ranks import end_ranks
from tools.checkpoint_convert.mcore_to_hf import convert

PP2 = {"pp": 2}


def rows(run_dir, name):
    return [
        {key: value for key, value in row.items() if key in ("step", "loss", "best_loss")}
        for row in read_metrics(run_dir, name)
    ]


def test_in_a_validation_pass(pool, digits, tmp_path):
    """Of its second pass nothing is written; the resumed run does it again and ends alike."""

    def tree_for(run_dir):
        return small_config(
            digits,
            run_dir,
            parallel=PP2,
            train={"steps": 4},
            validation={"share": 0.2, "interval": 2, "samples": 40},
            checkpoint={"save_interval": 2},
        )

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert all(pool.run(run_training, 2, tree_for(whole)))
    ranks = start_ranks(tree_for(parts), tmp_path / "killed", "killed_in_validation")
    try:
        ranks[1].join(120)
        assert ranks[1].exitcode == -signal.SIGKILL
    finally:
        end_ranks(ranks)
    assert [row["step"] for row in rows(parts, "validation")] == [2]
    assert all(pool.run(run_training, 2, tree_for(parts)))
    assert rows(parts, "validation") == rows(whole, "validation")
    assert rows(parts, "metrics") == rows(whole, "metrics")


def test_in_an_export(pool, digits, tmp_path):
    """What was begun is no export, and goes; it is made anew when the run goes on."""
    run_dir = tmp_path / "run"
    tree = small_config(
        digits,
        run_dir,
        parallel=PP2,
        train={"steps": 2},
        checkpoint={"save_interval": 1, "keep": 2, "also_export": True},
    )
    exports = run_dir / "exports"
    ranks = start_ranks(tree, tmp_path / "killed", "nothing")
    try:
        deadline = time.monotonic() + 120
        while not list(exports.glob(".step_*.tmp")):
            assert time.monotonic() < deadline and ranks[0].is_alive()
            time.sleep(0.005)
        working = psutil.Process(ranks[0].pid).children(recursive=True)
    finally:
        end_ranks(ranks)
    _, alive = psutil.wait_procs(working, timeout=20)
    assert not alive
    assert all(pool.run(run_training, 2, tree))
    names = [f"step_0000000{step}" for step in (1, 2)]
    assert sorted(path.name for path in exports.iterdir()) == names
    for name in names:
        convert(run_dir / "checkpoints" / name, tmp_path / name)
        assert files(exports / name) == files(tmp_path / name)
