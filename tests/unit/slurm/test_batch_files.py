"""The sbatch files as they are shipped: well formed, and right at their true configuration."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dattn_mcore.config.load import load_config

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "examples/slurm"
STAGES = ("import", "aln", "pt", "it", "export", "eval")
# Every model whose stages are in configs/.
MODELS = sorted(path.stem.removesuffix("_aln") for path in (ROOT / "configs").glob("*_aln.yaml"))
KINDS = [f"{model}_{stage}" for model in MODELS for stage in STAGES]
TRAINING = [name for name in KINDS if name.endswith(("_aln", "_pt", "_it"))]
SHARED = {"stages.sh", "launch.sh", "rank.sh", "submit.sh"}
SCRIPTS = sorted(path.name for path in FOLDER.iterdir())


def dry_run(name, *arguments, **environment):
    return subprocess.run(
        ["bash", str(FOLDER / f"{name}.sbatch"), "--dry-run", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "DATTN_VENV": sys.prefix, **environment},
        timeout=60,
    )


def python_arguments(output):
    """What follows the interpreter in the printed srun command."""
    words = shlex.split(output.splitlines()[0])
    return words[words.index(f"{sys.prefix}/bin/python") + 1 :]


def flags_of(name):
    """What sbatch reads in a file: each flag with its value, or None."""
    lines = re.findall(r"^#SBATCH (.*)$", (FOLDER / f"{name}.sbatch").read_text(), re.MULTILINE)
    parts = [part.partition("=") for line in lines for part in shlex.split(line)]
    return {flag: value if equal else None for flag, equal, value in parts}


def test_there_is_a_file_for_every_stage_of_every_model():
    assert {"mistral", "gemma", "qwen3_8b", "llama3_1_8b", "gemma3_4b"} <= set(MODELS)
    assert {f"{name}.sbatch" for name in KINDS} | SHARED == set(SCRIPTS)


@pytest.mark.parametrize("stage", STAGES)
def test_the_models_files_of_a_stage_differ_in_names_only(stage):
    """What models share is in stages.sh: a file says no more than its names and what sbatch reads."""

    def shape(model):
        text = (FOLDER / f"{model}_{stage}.sbatch").read_text().replace(model, "MODEL")
        text = re.sub(r"LLM=weights/\S+", "LLM=weights/NAME", text)
        return re.sub(r"^(# .*)$", "# ", text, flags=re.MULTILINE)

    assert len({shape(model) for model in MODELS}) == 1
    assert len(shape(MODELS[0]).splitlines()) < 16


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_reads_it(name):
    assert subprocess.run(["bash", "-n", str(FOLDER / name)], capture_output=True).stderr == b""


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_eval(name):
    code = [line.split("#")[0] for line in (FOLDER / name).read_text().splitlines()]
    assert not [line for line in code if re.search(r"(^|[\s;&|(])eval\s", line)]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    files = [str(FOLDER / name) for name in SCRIPTS]
    found = subprocess.run(["shellcheck", *files], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("name", KINDS)
def test_a_stopped_job_comes_back_and_keeps_its_output(name):
    flags = flags_of(name)
    assert flags["--requeue"] is None
    assert (flags["--open-mode"], flags["--job-name"]) == ("append", name)
    signal, _, seconds = flags["--signal"].partition("@")
    assert signal == "B:USR1" and int(seconds) >= 120


# Of a cluster that is not there: sbatch says what it has read, then finds no controller.
NO_CLUSTER = """ClusterName=none
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=9
AuthType=auth/none
NodeName=none
PartitionName=none Nodes=none Default=YES
"""


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="sbatch is not installed")
@pytest.mark.parametrize("stage", STAGES)
def test_sbatch_reads_all_of_it(tmp_path, stage):
    """Several flags stand on a line; the other models' files have the same lines."""
    name = f"qwen3_8b_{stage}"
    (tmp_path / "slurm.conf").write_text(NO_CLUSTER)
    result = subprocess.run(
        ["sbatch", "-v", str(FOLDER / f"{name}.sbatch")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "SLURM_CONF": str(tmp_path / "slurm.conf")},
        timeout=120,
    )
    read = dict(re.findall(r"^sbatch: ([a-z-]+) +: (.*)$", result.stderr, re.MULTILINE))
    flags = {flag.removeprefix("--"): value for flag, value in flags_of(name).items()}
    assert {*flags, "verbose"} == set(read)
    same = [key for key in flags if "node" in key or key in ("job-name", "signal", "cpus-per-task")]
    assert {key: read[key] for key in same} == {key: flags[key] for key in same}
    assert (read["requeue"], read["open-mode"]) == ("requeue", "a")
    assert read["output"].endswith("/%x-%j.out")
    days, _, hours = read["time"].rpartition("-")
    assert int(days or 0) * 24 + int(hours[:2]) == int(flags["time"][:2])


@pytest.mark.parametrize("name", TRAINING)
def test_dry_run_of_a_training_stage(name):
    """The trainer itself accepts the file's configuration on the file's nodes x GPUs."""
    result = dry_run(name)
    assert (result.returncode, result.stderr) == (0, "")
    config = load_config(ROOT / f"configs/{name}.yaml")
    arguments = python_arguments(result.stdout)
    assert arguments == [
        "pretrain_dattn.py",
        "--config",
        f"configs/{name}.yaml",
        f"log.run_dir={config.log.run_dir}",
    ]
    flags = flags_of(name)
    nodes, per_node, gpus = (
        int(flags[flag]) for flag in ("--nodes", "--ntasks-per-node", "--gpus-per-node")
    )
    assert per_node == gpus
    parallel = config.parallel
    dp = nodes * per_node // (parallel.tp * parallel.pp)
    assert (
        f"layout: {nodes * per_node} processes = tp {parallel.tp} x pp {parallel.pp} x dp {dp},"
        in result.stdout
    )
    assert f"srun --nodes={nodes} --ntasks={nodes * per_node} " in result.stdout


@pytest.mark.parametrize("name", [name for name in KINDS if name.endswith(("_import", "_export"))])
def test_dry_run_of_a_conversion(name):
    """The converter's own parser takes the printed command, and folders fit the stages'."""
    from tools.checkpoint_convert.__main__ import _parser

    result = dry_run(name)
    assert (result.returncode, result.stderr) == (0, "")
    module, *arguments = python_arguments(result.stdout)[1:]
    assert module == "tools.checkpoint_convert"
    chosen = _parser().parse_args(arguments)
    model = name.rpartition("_")[0]
    if name.endswith("import"):
        config = load_config(ROOT / chosen.config)
        assert chosen.output == config.checkpoint.init_from
        assert chosen.llm == config.data.tokenizer
    else:
        assert chosen.checkpoint == load_config(ROOT / f"configs/{model}_it.yaml").log.run_dir


@pytest.mark.parametrize("model", MODELS)
def test_dry_run_of_an_evaluation(model):
    """The evaluation's own parser takes the printed command, for the folder that was exported."""
    from dattn_mcore.evaluation.__main__ import _parser

    result = dry_run(f"{model}_eval", "--benchmarks", "pope,mme")
    assert (result.returncode, result.stderr) == (0, "")
    module, *arguments = python_arguments(result.stdout)[1:]
    assert module == "dattn_mcore.evaluation"
    chosen = _parser().parse_args(arguments)
    assert chosen.model == python_arguments(dry_run(f"{model}_export").stdout)[-1]


def test_flags_and_settings_reach_the_command():
    """Any number of nodes, arguments for the trainer, another run folder."""
    result = dry_run(
        "gemma_pt",
        "optim.lr=1e-6",
        "log.run_dir=runs/two words",
        "--config",
        "configs/gemma_it.yaml",
    )
    assert result.returncode == 0, result.stderr
    assert python_arguments(result.stdout) == [
        "pretrain_dattn.py",
        "--config",
        "configs/gemma_pt.yaml",
        "log.run_dir=runs/two words",
        "optim.lr=1e-6",
        "--config",
        "configs/gemma_it.yaml",
    ]
    assert "run_dir: runs/two words" in result.stdout
    assert "stage: instruct" in result.stdout


def test_what_the_trainer_refuses_ends_the_dry_run():
    result = dry_run("gemma_pt", "parallel.tp=3")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {"DATTN_REPO": "/nowhere"}, "error: REPO=/nowhere is not the repository; submit"),
        ([], {"DATTN_VENV": "/nowhere"}, "error: VENV=/nowhere has no bin/python; make it"),
        (
            [],
            {"DATTN_CONTAINER": "a.sif", "DATTN_CONTAINER_RUNTIME": "docker"},
            "error: CONTAINER_RUNTIME=docker is unknown; use pyxis or apptainer",
        ),
        ([], {"DATTN_CONTAINER": "a.sqsh"}, "error: pyxis starts containers in jobs only: sbatch"),
    ],
)
def test_mistakes_in_settings_give_one_line(arguments, environment, message):
    result = dry_run("gemma_pt", *arguments, **environment)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(message)


def test_started_without_sbatch_it_says_how():
    result = subprocess.run(
        ["bash", str(FOLDER / "gemma_pt.sbatch")], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 2
    assert "this is a batch script: sbatch " in result.stderr
