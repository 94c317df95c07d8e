"""Sinks: what each writes, what a resumed run does with it, and that a tracker ends no run."""

import json
import logging
import sys

import pytest
from PIL import Image

from dattn_mcore.config.load import from_dict
from dattn_mcore.errors import ConfigError
from dattn_mcore.training.sinks import build
from dattn_mcore.training.sinks.build import GuardedSink, build_sinks, check_trackers
from dattn_mcore.training.sinks.json_lines import JsonLinesSink
from dattn_mcore.training.sinks.run_facts import code_version, facts_of
from dattn_mcore.training.sinks.sink import Example, Row

TRAIN = {
    "loss": 0.5,
    "lr": 1e-3,
    "grad_norm": None,
    "samples_per_second": 12.0,
    "text_tokens_per_second": 2500.0,
    "visual_tokens_per_second": 1.5e6,
    "data_wait_share": 0.25,
    "eta_seconds": 75.0,
}


def config_of(run_dir, **log):
    return from_dict({"log": {"run_dir": str(run_dir), "tensorboard": False, **log}})


def facts(run_dir, first_step=0, **log):
    run_dir.mkdir(exist_ok=True)
    return facts_of(config_of(run_dir, **log), first_step=first_step, data_fingerprint="f00d")


@pytest.fixture
def examples(tmp_path):
    path = tmp_path / "wide.png"
    Image.new("RGB", (2000, 100), (255, 0, 0)).save(path)
    return [Example(path, "What | is\nthis?", "red", "red"), Example(None, "2 + 2?", "5", "4")]


def test_a_line_for_people(caplog):
    with caplog.at_level(logging.INFO):
        for kind, values in (
            ("train", TRAIN),
            (
                "validation",
                {
                    "loss": 1.25,
                    "loss/images": 1.5,
                    "loss/text_only": None,
                    "best_loss": 1.0,
                    "best_step": 20,
                    "samples": 64,
                    "seconds": 3.0,
                },
            ),
            ("scores", {"pope": 87.125}),
        ):
            build.ConsoleSink().write(Row(kind, 30, 400, values))
    assert [record.getMessage() for record in caplog.records] == [
        "step  30/400  loss 0.5000  lr 1.00e-03  grad none  12.0 samples/s  "
        "2.5k text + 1.5M visual tokens/s  ETA 1m 15s  waits for data 25%",
        "step  30/400  held-out loss 1.2500  images 1.5000  text-only none  best 1.0000 at step 20"
        "  64 samples in 3s",
        "step  30/400  pope 87.12",
    ]


def test_json_lines_of_steps_that_are_done_again_go(tmp_path):
    sink = JsonLinesSink(tmp_path, 0)
    for step in (10, 20, 30):
        sink.write(Row("train", step, 40, {"loss": step / 10}))
    sink.write(Row("validation", 30, 40, {"loss": 9.0}))
    sink.close()
    sink = JsonLinesSink(tmp_path, 20)
    sink.write(Row("train", 30, 40, {"loss": 3.5}))
    sink.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 2.0}, {"step": 30, "loss": 3.5}]
    assert (tmp_path / "validation.jsonl").read_text() == ""


def test_facts_are_recorded_and_a_run_that_starts_anew_is_another(tmp_path):
    run_dir = tmp_path / "run"
    first = facts(run_dir)
    assert (first.name, first.data_fingerprint) == ("run", "f00d")
    assert first.code_version == code_version() and first.code_version.startswith("0.")
    assert first.settings["log"]["run_dir"] == str(run_dir)
    first.keep_tracker_id("wandb", "abc")
    assert facts(run_dir, first_step=10, run_name="mine").tracker_id("wandb") == "abc"
    assert json.loads((run_dir / "run.json").read_text())["name"] == "mine"
    assert facts(run_dir, first_step=0).tracker_id("wandb") is None


def test_tensorboard_holds_scalars_settings_and_examples(tmp_path, examples):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_of(tmp_path, tensorboard=True)
    sink = build_sinks(config, facts_of(config, first_step=0, data_fingerprint="f"))[-1]
    sink.write(Row("train", 10, 20, TRAIN))
    sink.write(Row("validation", 10, 20, {"loss": 1.25}))
    sink.show("scores", 10, examples)
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "validation/loss"} <= set(tags["scalars"])
    assert "train/grad_norm" not in tags["scalars"]  # there was none
    assert [(e.step, e.value) for e in events.Scalars("validation/loss")] == [(10, 1.25)]
    (picture,) = events.Images("scores/0")
    assert (picture.width, picture.height) == (512, 26)
    (text,) = events.Tensors("scores/answers/text_summary")
    assert b"What \\| is this?" in text.tensor_proto.string_val[0]
    assert b"run_dir" in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]


def test_mlflow_goes_on_in_the_same_run(tmp_path, examples, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_dir = tmp_path / "run"
    for first_step, loss in ((0, 2.0), (10, 1.0)):
        about = facts(run_dir, first_step, mlflow=True, project="tried")
        sink = build_sinks(config_of(run_dir, mlflow=True, project="tried"), about)[-1]
        glob = {"loss//data/sa*.json": 3.0}  # of a source that is a pattern
        sink.write(Row("train", first_step + 10, 20, {**TRAIN, "loss": loss, **glob}))
        sink.show("scores", first_step + 10, examples)
        sink.close()
    client = mlflow.MlflowClient(tracking_uri=(run_dir / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("tried")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert run.data.metrics["train/loss.data.sa_.json"] == 3.0
    assert sorted((m.step, m.value) for m in history) == [(10, 2.0), (20, 1.0)]
    assert run.data.params["optim.lr"] == "0.002" and run.data.params["data_fingerprint"] == "f00d"
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"config.yaml", "scores"}


def test_wandb_is_offline_and_goes_on_in_the_same_run(tmp_path, examples, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name in ("WANDB_BASE_URL", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    run_dir = tmp_path / "run"
    for first_step in (0, 10):
        about = facts(run_dir, first_step, wandb=True)
        sink = build_sinks(config_of(run_dir, wandb=True), about)[-1]
        sink.write(Row("train", first_step + 10, 20, TRAIN))
        sink.show("scores", first_step + 10, examples)
        sink.close()
    run_id = json.loads((run_dir / "run.json").read_text())["trackers"]["wandb"]
    folders = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(folders) in (1, 2)  # the name has seconds
    assert all(folder.name.endswith(run_id) for folder in folders)
    content = b"".join(file.read_bytes() for folder in folders for file in folder.glob("*.wandb"))
    assert b"train/loss" in content and b"data_fingerprint" in content


class Broken:
    """A tracker that works once."""

    calls = 0

    def write(self, row):
        Broken.calls += 1
        if Broken.calls > 1:
            raise ConnectionError("no route\nto host")

    def show(self, kind, step, examples):
        raise AssertionError("asked after it had failed")

    def close(self):
        raise AssertionError("asked after it had failed")


def test_a_tracker_that_fails_ends_no_run(caplog):
    sink = GuardedSink("wandb", Broken)
    for step in (1, 2, 3):
        sink.write(Row("train", step, 3, TRAIN))
    sink.show("scores", 3, [])
    sink.close()
    (warning,) = caplog.records
    assert warning.getMessage() == (
        "log.wandb: the tracker cannot be written to (ConnectionError: no route); the run goes on "
        "without it, and its numbers stand in metrics.jsonl"
    )


def test_one_that_cannot_be_opened_ends_none_either(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    sinks = build_sinks(config_of(tmp_path, tensorboard=True), facts(tmp_path))
    sinks[-1].write(Row("train", 1, 2, TRAIN))
    assert "log.tensorboard: the tracker cannot be opened (" in caplog.text


@pytest.mark.usefixtures("fresh_imports")
def test_a_tracker_without_its_package_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_trackers(config_of(tmp_path))
    with pytest.raises(ConfigError) as raised:
        check_trackers(config_of(tmp_path, wandb=True))
    assert str(raised.value) == (
        "log.wandb=true needs the package wandb, which is not installed; run pip install wandb, or "
        "set it to false"
    )
