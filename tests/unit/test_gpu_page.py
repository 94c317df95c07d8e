"""docs/gpu.md, the container and the Kubernetes job: what they name exists, and fits together."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from dattn_mcore.cli import COMMANDS
from dattn_mcore.config.checks import data_parallel_size
from dattn_mcore.config.load import load_config
from dattn_mcore.training.main import parse_arguments

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
CODE = "\n".join(re.findall(r"^    (.*)$", PAGE, re.MULTILINE)).replace("\\\n", " ")
WORDS = f"{CODE}\n" + "\n".join(re.findall(r"`([^`\n]+)`", PAGE))
DOCKERFILE = (ROOT / "examples/container/Dockerfile").read_text(encoding="utf-8")
JOB = ROOT / "examples/kubernetes/gemma_pt.yaml"
FIELDS = yaml.safe_load((ROOT / "tests/fixtures/kubernetes/kubeflow_trainer.yaml").read_text())
OBJECTS = {one["kind"]: one for one in yaml.safe_load_all(JOB.read_text(encoding="utf-8"))}


def test_commands_of_the_project_exist():
    named = set(re.findall(r"\bdattn ([a-z]+)", CODE))
    assert "doctor" in named and named <= set(COMMANDS)
    for module in re.findall(r"python -m ([\w.]+)", WORDS):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists() or (
            ROOT / module.replace(".", "/") / "__main__.py"
        ).exists(), module
    assert len(CODE.splitlines()) > 15


def test_targets_of_make_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([\w./-]+)", WORDS))
    assert {".venv/installed", ".venv/bin/pip", "gpu-check"} <= targets
    for target in targets:
        pattern = re.escape(target).replace(r"\.venv/bin/pip", "%/bin/pip")
        assert re.search(rf"^{pattern}:", makefile, re.MULTILINE), target


def test_files_and_extras_exist():
    files = set(re.findall(r"\b(?:configs|examples)/[\w./-]+\w", PAGE))
    assert len(files) >= 4
    assert not [file for file in files if not (ROOT / file).exists()]
    for page in re.findall(r"\]\(([\w./]+)(?:#[\w-]+)?\)", PAGE):
        assert (ROOT / "docs" / page).exists(), page
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"'\.\[(\w+)\]'", CODE))
    assert extras == {"te", "flash"}
    assert all(f"\n{extra} = [" in project for extra in extras)


def test_settings_and_flags_exist():
    settings = set(re.findall(r"\b([a-z]+\.[a-z_0-9]+=[\w/.]+)", WORDS))
    assert {"train.fp8=none", "log.run_dir=runs/first"} <= settings
    load_config(None, sorted(settings))
    launcher = "".join(path.read_text() for path in (ROOT / "examples/slurm").glob("*.sh"))
    variables = set(re.findall(r"\b(DATTN_[A-Z_]+)", PAGE))
    assert variables and not [name for name in variables if name not in launcher]


def test_versions_are_those_of_the_metadata():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for text, requirement in (
        ("| PyTorch | 2.11 to 2.13 |", '"torch>=2.11,<2.14"'),
        ("| Triton | 3.4 to 3.9 |", '"triton>=3.4,<3.10;'),
        ("| Transformer Engine | 2.8 or newer, below 3 |", '"transformer-engine[pytorch]>=2.8,<3"'),
        ("| flash-attn 2 | 2.7 or newer, below 3 |", '"flash-attn>=2.7,<3"'),
        ("120` 2.0 to 2.4 |", "120>=2.0,<2.5;"),
    ):
        assert text in PAGE and requirement in project, text


@pytest.mark.parametrize("text", [PAGE, DOCKERFILE, JOB.read_text()], ids=["page", "image", "job"])
def test_no_host_of_an_index_or_a_registry_is_named(text):
    known = re.sub(r"trainer\.kubeflow\.org|nvidia\.com/gpu", "", text)
    assert not re.search(r"https?://|\b[\w-]+\.(io|com|org|net|ai)\b", known)


def test_the_image_is_built_from_what_is_named():
    lines = [
        line for line in DOCKERFILE.replace("\\\n", " ").splitlines() if line[:1] not in ("", "#")
    ]
    words = [line.split(maxsplit=1) for line in lines]
    assert [word for word, _ in words] == ["ARG", "FROM", "WORKDIR", "COPY", "RUN", "CMD"]
    assert words[0][1] == "PYTORCH_IMAGE" and words[1][1] == "${PYTORCH_IMAGE}"
    assert "--build-arg PYTORCH_IMAGE=" in CODE
    pip = shlex.split(words[4][1].split("&&")[-1])
    assert pip[1:] == [
        *["python", "-m", "pip", "install", "--no-cache-dir", "--no-build-isolation"],
        "--editable",
        ".",
    ]
    assert words[5][1] == '["python", "-m", "dattn_mcore.doctor"]'
    ignored = (ROOT / "examples/container/Dockerfile.dockerignore").read_text().split()
    folders = re.findall(r"^/(\w+)/$", (ROOT / ".gitignore").read_text(), re.MULTILINE)
    assert {".git", ".venv*", *folders} <= set(ignored)


def misfits(value, schema, where=""):
    """Where a value does not fit a published definition: fields, types, what is required."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    kinds |= {"integer or string": (int, str)}
    kind = schema.get("type")
    if kind is not None and (
        not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "boolean")
    ):
        return [f"{where} is no {kind}"]
    found = []
    if isinstance(value, dict):
        found += [
            f"{where}.{name} is missing" for name in schema.get("required", []) if name not in value
        ]
        for name, inner in value.items():
            if "properties" in schema and name not in schema["properties"]:
                found.append(f"{where}.{name} is unknown")
            below = schema.get("properties", {}).get(name, schema.get("additionalProperties", {}))
            found += misfits(inner, below, f"{where}.{name}")
    if isinstance(value, list):
        for number, inner in enumerate(value):
            found += misfits(inner, schema.get("items", {}), f"{where}[{number}]")
    return found


@pytest.mark.parametrize("kind", ["TrainingRuntime", "TrainJob"])
def test_the_job_fits_the_published_definitions(kind):
    assert misfits(OBJECTS[kind], FIELDS[kind]) == []
    assert OBJECTS[kind]["apiVersion"] == "trainer.kubeflow.org/v1alpha1"


def test_a_wrong_job_does_not_fit():
    job = yaml.safe_load(yaml.safe_dump(OBJECTS["TrainJob"]))
    job["spec"]["trainer"] |= {"numNode": 4, "numNodes": "4", "env": [{"value": "1"}]}
    del job["spec"]["runtimeRef"]
    assert set(misfits(job, FIELDS["TrainJob"])) == {
        ".spec.runtimeRef is missing",
        ".spec.trainer.numNodes is no integer",
        ".spec.trainer.env[0].name is missing",
        ".spec.trainer.numNode is unknown",
    }


def test_parts_of_the_job_name_each_other():
    runtime, job = OBJECTS["TrainingRuntime"], OBJECTS["TrainJob"]["spec"]
    assert job["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    labels = node["template"]["metadata"]["labels"]
    assert labels == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (node["name"], container["name"]) == ("node", "node")
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert container["workingDir"] in DOCKERFILE and container["image"] in CODE


def test_the_trainer_takes_the_jobs_command():
    """And its layout fits the nodes and processes; the doctor gets the same arguments before it."""
    trainer = OBJECTS["TrainJob"]["spec"]["trainer"]
    config, instead = parse_arguments(trainer["args"])
    assert not instead.dry_run
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert data_parallel_size(config, trainer["numNodes"] * trainer["numProcPerNode"]) >= 1
    shell, flag, script, name = trainer["command"]
    assert (shell, flag, name) == ("bash", "-c", "gemma-pt")
    assert script.split(" && ") == [
        'python -m dattn_mcore.doctor "$@"',
        'exec torchrun pretrain_dattn.py "$@"',
    ]
    folders = ("data", "weights", "checkpoints", "runs")
    assert config.log.run_dir.split("/")[0] in folders
    assert config.data.tokenizer.split("/")[0] in folders
