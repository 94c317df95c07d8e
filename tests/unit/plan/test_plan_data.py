"""What the planner knows of data that are on this machine: the run's own number of steps."""

import pytest

from dattn_mcore.config.load import from_dict
from dattn_mcore.data.index.store import open_index
from dattn_mcore.data.pipeline import DataPipeline
from dattn_mcore.data.tokenizer import load_tokenizer
from dattn_mcore.plan.__main__ import main
from dattn_mcore.plan.data_size import data_size
from tests.distributed.small_models import small_config


@pytest.fixture
def config(digits, tmp_path):
    """Steps of full packs, with an index folder of this test's own."""
    tree = small_config(digits, tmp_path / "run")
    tree["data"] |= {
        "index_dir": str(tmp_path / "index"),
        "step_packs_multiple": 1,
        "text_budget": 400,
    }
    tree["train"] |= {"steps": None, "epochs": 2.0}
    return from_dict(tree)


def test_steps_are_the_runs_own_where_its_index_is_here(config, tmp_path):
    assert data_size(config).steps is None and data_size(config).samples == 96
    assert not (tmp_path / "index").exists()  # a plan makes none
    tokenizer = load_tokenizer(config.data.tokenizer)
    open_index(config, tokenizer)
    known = data_size(config)
    pipeline = DataPipeline(
        config, tokenizer, dp_rank=0, dp_size=1, microbatch_multiple=1, needs_pixels=False
    )
    assert (known.samples, known.steps) == (96, pipeline.steps.up_to(2 * 96))
    assert known.steps != 2 * 96 // config.train.global_batch_size
    pipeline.close()


def test_days_of_full_packs_are_about_where_lengths_are_not_known(capsys):
    command = ["--config", "configs/gemma_pt.yaml", "--samples", "1000000", "--tp", "2"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "about 0." in out and "days are about: with data.step_packs_multiple=16" in out
    assert main([*command, "data.step_packs_multiple=null"]) == 0
    assert "about 0." not in capsys.readouterr().out
