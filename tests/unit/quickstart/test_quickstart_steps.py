"""The commands of the quickstart, and the settings that are not the user's."""

from pathlib import Path

import pytest

from dattn_mcore.config.load import load_config
from dattn_mcore.errors import ConfigError
from dattn_mcore.quickstart.steps import DATA, ROOT, STAGES, make_run, processes_of
from dattn_mcore.training.main import parse_arguments


def _plan(*overrides, data=DATA):
    return make_run(Path("runs/quickstart"), data, overrides)


def test_the_stages_stand_between_data_and_evaluation():
    assert [step.name for step in _plan().steps] == ["data", *STAGES, "convert", "answer"]


def test_one_stage_is_tensor_parallel_and_another_pipeline_parallel():
    titles = {step.name: step.title for step in _plan().steps}
    assert any("tensor parallel 2" in title for title in titles.values())
    assert any("pipeline parallel 2" in title for title in titles.values())


def test_context_parallel_ranks_stand_beside_the_layouts_of_the_stages():
    steps = _plan("parallel.cp=2").steps[1:4]
    assert all("context parallel 2" in step.title for step in steps)
    started = {step.command[step.command.index("--nproc-per-node") + 1] for step in steps}
    assert started == {"4", "2"}  # with tensor or pipeline ranks, and alone


def test_every_training_command_is_one_that_the_trainer_takes():
    before = None
    for step in _plan("train.steps=7").steps[1:4]:
        arguments = step.command[step.command.index("pretrain_dattn.py") + 1 :]
        config, _ = parse_arguments(
            [str(a).replace("configs/", f"{ROOT}/configs/") for a in arguments]
        )
        assert config.train.steps == 7
        assert config.train.stage == step.name
        assert config.checkpoint.init_from == before
        assert step.typed.startswith("torchrun --nproc-per-node 2 pretrain_dattn.py --config ")
        before = config.log.run_dir


def test_other_data_is_named_in_every_stage():
    for step in _plan(data=Path("elsewhere/digits")).steps[1:4]:
        assert f"data.annotations=elsewhere/digits/{step.name}.json" in step.command
        assert "data.image_folder=elsewhere/digits/images" in step.command


@pytest.mark.parametrize(
    "override", ["log.run_dir=x", "checkpoint.init_from=x", "data.image_folder=x", "train.stage=x"]
)
def test_settings_that_the_quickstart_makes_are_refused(override):
    with pytest.raises(ConfigError, match="sets this itself"):
        _plan(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [("optim.lrr=1", "did you mean 'optim.lr'"), ("parallel.tp=3", "multiples of parallel.tp=3")],
)
def test_a_setting_that_cannot_run_is_reported_before_anything_starts(override, message):
    with pytest.raises(ConfigError, match=message):
        _plan(override)


@pytest.mark.parametrize(
    ("overrides", "processes"),
    [
        ([], 2),
        (["parallel.tp=2"], 2),
        (["parallel.tp=2", "parallel.pp=2"], 4),
        (["parallel.tp=4", "parallel.pp=2"], 8),
    ],
)
def test_two_processes_or_as_many_as_a_model_needs(overrides, processes):
    assert processes_of(load_config(None, overrides)) == processes
