"""A model of images becomes one of videos: `checkpoint.init_from`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dattn_mcore.architectures.sizes import VideoConfig
from dattn_mcore.architectures.tables import model_table
from dattn_mcore.checkpoint.load import load_weights
from dattn_mcore.errors import CheckpointError
from tests.unit.checkpoint.runs import small_run
from tests.unit.convert.convert_helpers import make_tokenizer, plan, random_tensors, small_config
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint, write_checkpoint

TIME = "projector.time_position."
VIDEOS = VideoConfig(enabled=True)
SECONDS = VideoConfig(enabled=True, time_axis="seconds")


def with_videos(config, video=VIDEOS):
    return replace(config, model=replace(config.model, video=video))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return small_config(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def written(path, config):
    table = model_table(config.model)
    write_checkpoint(path, plan(table, random_tensors(table, torch.float32, 3)), config)
    return path


def test_positions_in_time_start_as_those_of_a_fresh_model(config, tmp_path):
    images, videos = written(tmp_path / "images", config), with_videos(config)
    with small_run(tmp_path / "checkpoints", videos) as small:
        fresh = {name: value.clone() for name, value in small.weights().items()}
        for chunk in small.chunks:  # whatever was there
            for parameter in chunk.parameters():
                parameter.data.fill_(7.0)
        load_weights(images, videos, small.chunks, small.groups)
        loaded = small.weights()
    of_time = {name for name in loaded if name.startswith(TIME)}
    assert len(of_time) == 4
    for name in of_time:
        assert torch.equal(loaded[name], fresh[name]), name
    saved = DistCheckpoint(images)
    whole = (set(saved.shapes) & set(loaded)) - of_time
    assert "projector.row_position.fc1.weight" in whole
    for name in whole:
        assert torch.equal(loaded[name], saved.read(name)), name


def test_positions_that_were_learned_are_loaded(config, tmp_path):
    videos = with_videos(config)
    learned = written(tmp_path / "videos", videos)
    with small_run(tmp_path / "checkpoints", videos) as small:
        load_weights(learned, videos, small.chunks, small.groups)
        loaded = small.weights()
    for name in (name for name in loaded if name.startswith(TIME)):
        assert torch.equal(loaded[name], DistCheckpoint(learned).read(name)), name


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        (VIDEOS, VideoConfig(), "model.video.enabled is True there and False"),
        (VIDEOS, SECONDS, "model.video.time_axis is 'clip' there and 'seconds'"),
    ],
)
def test_another_model_of_videos_is_refused(config, tmp_path, there, here, said):
    saved = written(tmp_path / "saved", with_videos(config, there))
    other = with_videos(config, here)
    with (
        small_run(tmp_path / "checkpoints", other) as small,
        pytest.raises(CheckpointError, match=said),
    ):
        load_weights(saved, other, small.chunks, small.groups)
