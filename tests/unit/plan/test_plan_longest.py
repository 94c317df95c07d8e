"""The most visual rows that fit: the command, and the table of docs/planning.md."""

import dataclasses
from pathlib import Path

import pytest

from dattn_mcore.config.load import load_config
from dattn_mcore.plan.__main__ import main
from dattn_mcore.plan.estimate import make_plan
from dattn_mcore.plan.hardware import GPUS, Cluster
from dattn_mcore.plan.longest import longest_plan, longest_rows
from dattn_mcore.plan.workload import Sample

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
NAMES = {"mistral_pt": "Mistral 7B", "gemma_pt": "Gemma 2 9B", "qwen3_8b_pt": "Qwen3 8B"}


@pytest.mark.parametrize("nodes", [1, 8])
@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_the_page(name, nodes):
    config = load_config(ROOT / f"configs/{name}.yaml")
    for cells in longest_rows(config, Cluster(nodes, 8), GPUS["h100"], 512):
        assert "| " + " | ".join([NAMES[name], *cells]) + " |\n" in PAGE


def test_one_tile_more_does_not_fit():
    """In the layout that was chosen; and half the GPUs hold fewer rows."""
    config = load_config(ROOT / "configs/mistral_pt.yaml")
    plan = longest_plan(config, Cluster(1, 8), GPUS["h100"], 512)
    assert plan is not None and plan.fits and plan.config.parallel.cp > 1
    tiles = round(plan.step.pack.tiles)
    rows = (tiles + 1) * config.model.vision.rows_per_tile
    data = dataclasses.replace(plan.config.data, visual_budget=rows)
    longer = dataclasses.replace(plan.config, data=data)
    sample = Sample(512, tiles + 1)
    assert not make_plan(longer, plan.cluster, plan.gpu, False, sample).fits
    half = longest_plan(config, Cluster(1, 4), GPUS["h100"], 512)
    assert half is not None and half.step.pack.visual < plan.step.pack.visual / 1.5


def test_the_command_prints_both(capsys):
    command = ["--config", str(ROOT / "configs/mistral_pt.yaml"), "--gpu", "h100", "--longest"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "D-Attn" in said and "ring attention" in said and "computed, not measured" in said
    for arguments, words in ((["--tp", "2"], "leave out a layout"), (["--json"], "out --json")):
        assert main([*command, *arguments]) == 2
        error = capsys.readouterr().err
        assert "--longest tries all layouts" in error and words in error and error.count("\n") == 1
    assert main([*command, "--text-per-sample", "nan"]) == 2
    assert "--text-per-sample nan must be a number" in capsys.readouterr().err
