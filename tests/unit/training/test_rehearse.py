"""`--rehearse`: ranks of large jobs on this machine, beside the planner's numbers."""

import re
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dattn_mcore.config.load import load_config
from dattn_mcore.parallel import platform, rehearsal
from dattn_mcore.training.main import main
from dattn_mcore.training.rehearsal_report import compared, rehearse_full
from dattn_mcore.training.rehearse import as_rehearsed, last_stage_rank

ROOT = Path(__file__).resolve().parents[3]
GEMMA, MISTRAL = (str(ROOT / f"configs/{name}_pt.yaml") for name in ("gemma", "mistral"))
NO_OVERLAP = ["parallel.overlap_grad_reduce=false", "parallel.overlap_param_gather=false"]
FEW_LAYERS = [*NO_OVERLAP, "model.llm.num_layers=8", "train.fp8=none"]
MIB = 2**20


def test_the_versions_of_torch_for_which_it_holds():
    """It uses what PyTorch does not publish. A new version is added once these tests, and those of
    tests/distributed/test_rehearsal.py, pass with it."""
    assert rehearsal.TORCH == ("2.13",)
    locked = (ROOT / "constraints-torch.txt").read_text(encoding="utf-8")
    assert re.search(r"^torch==(\d+\.\d+)", locked, re.M).group(1) in rehearsal.TORCH
    assert torch.__version__.startswith(rehearsal.TORCH)


@pytest.mark.parametrize(
    ("path", "settings", "world_size", "ranks"),
    [
        (GEMMA, [], 32, [0]),
        (MISTRAL, ["parallel.pp=2", *NO_OVERLAP], 512, [0, 256]),
        (MISTRAL, ["parallel.cp=4", *FEW_LAYERS], 8, [0]),
    ],
    ids=["gemma", "mistral-pp2", "mistral-cp4"],
)
def test_the_planner_says_what_a_rehearsal_finds(path, settings, world_size, ranks):
    config, _ = as_rehearsed(load_config(path, settings))
    assert sorted({0, last_stage_rank(config, world_size)}) == ranks
    for rank in ranks:
        rehearsed = rehearse_full(config, world_size, rank)
        memory, exchanged = compared(config, rehearsed)
        for row in memory:
            assert abs(row.apart) <= (0.0 if row.exact else 0.05), row
        for row in exchanged:
            if row.name in ("tensor", "context", "data", "pipeline"):
                assert abs(row.apart) <= 0.05, row
    assert not dist.is_initialized()
    assert torch.zeros(2).device == platform.current_device()  # all is as before


def test_what_is_kept_beside_chunks_of_visual_rows_on_context_parallel_ranks():
    """Queries of all text rows are kept, although visual rows are not."""
    more = ["parallel.cp=4", "train.recompute_visual_chunk=512", *FEW_LAYERS]
    config, _ = as_rehearsed(load_config(MISTRAL, more))
    memory, _ = compared(config, rehearse_full(config, 8, 0))
    (kept,) = (row for row in memory if row.name == "activations kept")
    assert abs(kept.apart) <= 0.05, kept


@pytest.mark.parametrize(
    ("settings", "recompute"),
    [([], "none"), (["parallel.tp=2", "parallel.sp=true"], "full")],
    ids=["cp4", "cp4-tp2-full"],
)
def test_the_planner_counts_every_byte_between_context_parallel_ranks(settings, recompute):
    """Attention of all layers, and rows before the first: of five tiles one rank has two."""
    more = ["parallel.cp=4", f"train.recompute={recompute}", "data.visual_budget=20", *settings]
    config, _ = as_rehearsed(load_config(None, more))
    assert config.data.visual_budget // config.model.vision.rows_per_tile == 5
    tp = config.parallel.tp
    rows = [
        {row.name: row for row in compared(config, rehearse_full(config, 4 * tp, rank))[1]}
        for rank in range(0, 4 * tp, tp)
    ]
    sent = [of_rank["context"].rehearsed for of_rank in rows]
    assert {of_rank["context"].planned for of_rank in rows} == {max(sent)}
    assert min(sent) < max(sent)  # attention alone is even


def test_the_command_prints_both_and_takes_no_memory(capsys):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    short = ["model.llm.num_layers=4", "train.recompute=full", "train.recompute_layers=1"]
    assert main(["--config", MISTRAL, "--rehearse", "64", *short]) == 0
    said = capsys.readouterr().out
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    weights = int(re.search(r"^weights +([\d,]+)", said, re.M).group(1).replace(",", ""))
    assert weights > 1500 * MIB and grown < 500 * MIB
    assert said.count("rank 0 of 64 = tp 2 x pp 1 x dp 32, sequence parallel") == 1
    assert len(re.findall(r"^(?:weights|gradients|optimizer states) .* equal$", said, re.M)) == 3
    assert re.search(r"^dp_cp +32  reduce_scatter +\d+  float32 \[\d+\]", said, re.M)
    assert re.search(
        r"^tp +2  all_gather +\d+  bfloat16 \[9936, 1, 4096\] +81,395,712$", said, re.M
    )
    assert "train.fp8=tensorwise is left out" in said and "not seen here: kernels" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rehearse", "33"], "--rehearse 33: the processes of the job must be a multiple of 2"),
        (["--rehearse", "0"], "--rehearse 0: the processes of the job must be a multiple of 2"),
        (["--rehearse", "many"], "--rehearse many must be a whole number"),
        (["--rehearse", "32", "--rehearse-rank", "32"], "is no rank of 32 processes"),
        (["--rehearse", "32", "--rehearse-rank", "-1"], "--rehearse-rank"),
        (["--rehearse-rank", "3"], "--rehearse-rank 3 needs --rehearse N"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, capsys):
    assert main(["--config", GEMMA, *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and words in said
