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
from tests.unit.evaluation.test_evaluation_run import run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed"
)

TASK = """
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
task: vizwiz_tiny
test_split: test
output_type: generate_until
doc_to_visual: !function helpers.images
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
    """`lmms_eval --model dattn_mcore` gives the answers of our own run, in batches too."""
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
    trees.put(tasks / "vizwiz_tiny.yaml", TASK.format(data=data))
    trees.put(tasks / "helpers.py", HELPERS)
    command = [sys.executable, "-m", "lmms_eval", "--model", "dattn_mcore"]
    command += ["--model_args", f"pretrained={tiny_model / 'tiny'}", "--tasks", "vizwiz_tiny"]
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
