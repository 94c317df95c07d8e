"""The plug-in, found and run by lmms-eval itself; skipped where lmms-eval is not installed."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from tests.unit.evaluation import trees
from tests.unit.evaluation.conftest import ROOT
from tests.unit.evaluation.tiny_runs import run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed"
)

TASK = """
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
task: {name}
test_split: test
output_type: generate_until
doc_to_visual: !function helpers.{images}
doc_to_text: !function helpers.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 6, temperature: 0, num_beams: 1, do_sample: false}}
process_results: !function helpers.results
metric_list:
  - {{metric: exact, aggregation: mean, higher_is_better: true}}
metadata: {{version: 0.0}}
"""
HELPERS = """
from PIL import Image

def images(doc):
    return [Image.open(doc["image"])] if doc["image"] else []

def film(doc):
    return images(doc) or ["film.mp4"]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["text"]

def results(doc, results):
    return {"exact": float(results[0] == doc["answer"])}
"""


@pytest.fixture
def environment(tmp_path):
    """An environment in which our package is installed, as far as its metadata goes."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    paths = os.pathsep.join([str(ROOT), str(tmp_path)])
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **offline}


def test_a_task_through_lmms_eval(tiny_model, tmp_path, environment):
    """`lmms_eval --model dattn_mcore` gives the answers of our own run, in batches too.

    A task of the same run in which one document of three shows a film has no score.
    """
    root = tiny_model / "val/vizwiz"
    assert run(tiny_model, tmp_path / "own", "--benchmarks=vizwiz,scienceqa") == 0
    documents = []
    for name, images in (("vizwiz", root / "test"), ("scienceqa", None)):
        for line in (tmp_path / f"own/answers/{name}.jsonl").read_text().splitlines():
            record = json.loads(line)
            document = {"text": record["prompt"], "answer": record["text"], "image": ""}
            if images is not None:
                document["image"] = str(images / f"VizWiz_test_{record['question_id']}.jpg")
            elif "<image>" in record["prompt"]:
                continue
            documents.append(document)
    assert len(documents) == 3 and [d["image"] == "" for d in documents] == [False, False, True]
    tasks = tmp_path / "tasks"
    data = trees.lines(tmp_path / "documents.json", documents)
    for name, images in (("vizwiz_tiny", "images"), ("film_tiny", "film")):
        task = TASK.format(data=data, name=name, images=images)
        trees.put(tasks / f"{name}.yaml", task)
    trees.put(tasks / "helpers.py", HELPERS)
    command = [sys.executable, "-m", "lmms_eval", "--model", "dattn_mcore"]
    command += ["--model_args", f"pretrained={tiny_model / 'tiny'}", "--tasks"]
    command += ["film_tiny,vizwiz_tiny"]
    command += ["--include_path", str(tasks), "--batch_size", "2", "--device", "cpu"]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    command += ["--verbosity", "DEBUG"]  # without it, an error ends with status 0
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400
    )
    output = done.stdout[-3000:] + done.stderr[-3000:]
    written = sorted(path.name for path in (tmp_path / "out").rglob("*_results.json"))
    assert len(written) == 1 and done.returncode == 0, output
    (result,) = (tmp_path / "out").rglob("*_results.json")
    report = json.loads(result.read_text())
    assert report["n-samples"]["vizwiz_tiny"] == {"original": 3, "effective": 3}, output
    assert report["results"]["vizwiz_tiny"]["exact,none"] == 1.0, output
    assert not any("exact" in name for name in report["results"].get("film_tiny", {})), output
    assert "task film_tiny failed and has no score (film_tiny, document 2: shows" in (
        done.stdout + done.stderr
    )
    (samples,) = (tmp_path / "out").rglob("*_samples_vizwiz_tiny.jsonl")
    answers = [json.loads(line) for line in samples.read_text().splitlines()]
    given = {answer["doc_id"]: answer["filtered_resps"] for answer in answers}
    assert given == {n: document["answer"] for n, document in enumerate(documents)}, output
    assert re.search(r"vizwiz_tiny.*exact", done.stdout)


def test_the_interface(tiny_model, tmp_path):
    """What lmms-eval's base class wants, and clear errors."""
    from lmms_eval.api.instance import Instance
    from lmms_eval.api.model import lmms
    from PIL import Image

    from dattn_mcore.errors import ConfigError
    from dattn_mcore.evaluation.lmms_eval_manifest import manifest
    from dattn_mcore.evaluation.lmms_eval_model import DattnMcore, cut, generation_settings

    assert issubclass(DattnMcore, lmms) and DattnMcore.is_simple
    assert manifest().simple_class_path.endswith("lmms_eval_model.DattnMcore")
    model = DattnMcore.create_from_arg_string(
        f"pretrained={tiny_model / 'tiny'}", {"batch_size": 2, "device": "cpu"}
    )
    picture = Image.open(tiny_model / "val/vizwiz/test/VizWiz_test_0.jpg")
    model.task_dict = {"t": {"s": [[picture], [picture, picture], [], ["film.mp4"]]}}

    def ask(*asked):
        requests = [
            Instance(
                request_type="generate_until",
                arguments=(text, settings, lambda doc: doc, number, "t", "s"),
                idx=0,
                metadata={"task": "t", "doc_id": number, "repeats": 1},
            )
            for text, settings, number in asked
        ]
        return model.generate_until(requests)

    short, long = {"max_new_tokens": 2}, {"max_new_tokens": 6, "until": ["\n\n"]}
    together = ask(("a?", short, 0), ("b?", long, 1), ("c?", long, 2), ("d <image>?", long, 0))
    alone = [ask(one)[0] for one in (("a?", short, 0), ("b?", long, 1), ("c?", long, 2))]
    assert together[:3] == alone and len(together[0]) < len(together[1])
    with pytest.raises(ConfigError, match="t, document 3: shows something else than images"):
        ask(("e?", short, 3))
    with pytest.raises(ConfigError, match="task t failed and has no score"):
        model.clean()
    with pytest.raises(NotImplementedError, match="generation tasks"):
        model.loglikelihood([])
    with pytest.raises(ConfigError, match="--model_args has 'pretrainde'"):
        DattnMcore(str(tiny_model / "tiny"), pretrainde="x")
    with pytest.raises(ConfigError, match="--batch_size is 'auto'"):
        DattnMcore(str(tiny_model / "tiny"), batch_size="auto")
    assert cut("one\n\ntwo", ["\n\n"]) == "one"
    assert generation_settings({"temperature": 0.7, "max_new_tokens": 3}) == (
        3,
        {"num_beams": 1, "do_sample": True, "temperature": 0.7, "top_p": 1.0},
    )


class Documents:
    """A task of lmms-eval, as far as the model sees it: its images by number, its requests."""

    def __init__(self, name, shown):
        self.name, self.shown = name, shown
        self.instances = [self.request(number) for number in range(len(shown))]

    def request(self, number):
        from lmms_eval.api.instance import Instance

        return Instance(
            request_type="generate_until",
            arguments=("a?", {"max_new_tokens": 2}, self.images, number, self.name, "test"),
            idx=0,
            metadata={"task": self.name, "doc_id": number, "repeats": 1},
        )

    def images(self, document):
        if isinstance(document, Exception):
            raise document
        return document


@pytest.fixture
def model(tiny_model):
    from dattn_mcore.evaluation.lmms_eval_model import DattnMcore

    return DattnMcore(str(tiny_model / "tiny"), batch_size=2, device="cpu")


@pytest.mark.parametrize("broken", ["film.mp4", OSError("no such file: x.jpg"), "too large"])
def test_a_task_that_fails_fails_alone(tiny_model, model, broken, caplog, monkeypatch):
    """With one document of three that cannot be shown; the other task has its answers."""
    from PIL import Image

    picture = Image.open(tiny_model / "val/vizwiz/test/VizWiz_test_0.jpg").convert("RGB")
    bad = broken if isinstance(broken, Exception) else [broken]
    if broken == "too large":
        monkeypatch.setattr("dattn_mcore.evaluation.lmms_eval_model.MAX_PIXELS", 30 * 25)
        bad = [Image.new("RGB", (100, 100))]
    film, good = Documents("film", [[picture], bad, []]), Documents("good", [[picture], []])
    model.task_dict = {task.name: {"test": task.shown} for task in (film, good)}
    alone = model.generate_until([good.request(number) for number in range(2)])
    # Of the failing task one request is not asked: lmms-eval took it from its cache.
    requests = [film.instances[0], good.instances[0], film.instances[1], good.instances[1]]
    answers = model.generate_until(requests)
    model.clean()
    assert [answers[1], answers[3]] == alone and all(alone)
    assert [answers[0], answers[2]] == ["", ""]  # which lmms-eval's cache does not keep
    assert [request.doc_id for request in film.instances] == [None] * 3  # no document is scored
    assert [request.doc_id for request in good.instances] == [0, 1]
    (line,) = [record.getMessage() for record in caplog.records if "failed" in record.message]
    assert line.startswith("dattn_mcore: task film failed and has no score (")
    assert ("document 1" in line) or "OSError: no such file" in line
    assert line.endswith("; the other tasks go on")


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until_multi_round"])
def test_a_task_of_another_kind_fails_alone(model, kind):
    good, other = Documents("good", [[]]), Documents("other", [[], []])
    model.task_dict = {task.name: {"test": task.shown} for task in (good, other)}
    assert getattr(model, kind)(other.instances) == ["", ""]
    assert [request.doc_id for request in other.instances] == [None, None]
    assert all(model.generate_until(good.instances)) and good.instances[0].doc_id == 0
    model.clean()
    model.task_dict = {"other": {"test": other.shown}}
    with pytest.raises(NotImplementedError, match="take such a task"):
        getattr(model, kind)(other.instances)


def test_what_failed_on_another_process_fails_here(monkeypatch):
    """Scored alone, the documents of this process would be a part that passes for the whole."""
    from torch import distributed

    from dattn_mcore.evaluation.lmms_eval_failures import TaskFailures

    here, task = TaskFailures(), Documents("film", [[]])
    here.seen(task.instances)

    def gather(everywhere, own):
        everywhere[:] = [own, {"film": "film, document 7: shows something else"}]

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather_object", gather)
    here.share()
    assert task.instances[0].doc_id is None
    assert here.summary() == (
        "task film failed and has no score (film, document 7: shows something else)"
    )
