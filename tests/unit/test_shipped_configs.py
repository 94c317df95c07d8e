"""Every shipped YAML loads, passes the checks, and fits one process and its own layout."""

from pathlib import Path

import pytest

from dattn_mcore.config.checks import check_config, data_parallel_size, processes_per_replica
from dattn_mcore.config.load import load_config
from dattn_mcore.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
DIGITS = [ROOT / "configs" / f"digits_{stage}.yaml" for stage in ("align", "pretrain", "instruct")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_it_runs_in_its_own_layout_and_in_one_process(path):
    config = load_config(path)
    check_config(config)
    assert data_parallel_size(config, processes_per_replica(config)) == 1
    alone = ["parallel.tp=1", "parallel.pp=1", "parallel.vpp=1", "parallel.sp=false"]
    check_config(load_config(path, alone))


@pytest.mark.parametrize("path", [None, *DIGITS], ids=lambda path: path.name if path else "default")
def test_the_digits_model_fits_tensor_parallel_4_and_pipeline_parallel_2(path):
    config = load_config(path, ["parallel.tp=4", "parallel.pp=2"])
    check_config(config)
    assert data_parallel_size(config, 8) == 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_base_file_says_what_it_is(path):
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_the_stages_of_the_digits_task_share_a_model_and_follow_each_other():
    align, pretrain, instruct = (load_config(path) for path in DIGITS)
    assert align.model == pretrain.model == instruct.model
    assert pretrain.checkpoint.init_from == align.log.run_dir
    assert instruct.checkpoint.init_from == pretrain.log.run_dir
    assert len({config.log.run_dir for config in (align, pretrain, instruct)}) == 3


def test_the_embedded_default_is_the_pretrain_stage_of_the_digits_task():
    default, pretrain = Config(), load_config(DIGITS[1])
    assert default.model == pretrain.model
    assert default.data == pretrain.data
    assert default.train.stage == pretrain.train.stage
