"""`dattn doctor` in processes of its own: a true picture here, and of machines that are simulated.

A package is simulated by a folder on PYTHONPATH, a program by a script on PATH.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SMALL = ("train.device=cpu", "data.image_backend=pillow", "log.tensorboard=false")
SMI = """#!/bin/sh
echo "0, NVIDIA H100 80GB HBM3, {driver}, 81559, 9.0"
echo "1, NVIDIA H100 80GB HBM3, {driver}, 81559, 9.0"
"""


class Machine:
    """This machine, with other packages and programs on it."""

    def __init__(self, folder):
        self.packages, self.programs = folder / "packages", folder / "bin"
        self.packages.mkdir()
        self.programs.mkdir()
        self.path = f"{self.programs}{os.pathsep}{os.environ['PATH']}"

    def package(self, name, text, release=None):
        """A package whose import runs a text."""
        folder = self.packages / name
        folder.mkdir()
        (folder / "__init__.py").write_text(text)
        if release is not None:
            info = self.packages / f"{name}-{release}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n"
            )

    def program(self, name, text):
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def run(self, *command):
        return subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={
                **os.environ,
                "PATH": self.path,
                "PYTHONPATH": f"{self.packages}{os.pathsep}{ROOT}",
                "OMP_NUM_THREADS": "1",
            },
            timeout=300,
        )

    def doctor(self, *arguments):
        done = self.run("-m", "dattn_mcore.doctor", *arguments)
        assert "Traceback" not in done.stdout + done.stderr, done.stderr[-3000:]
        return done

    def found(self, *arguments):
        """What it says in JSON: its status, and the report with rows by table and name."""
        done = self.doctor("--json", *arguments)
        report = json.loads(done.stdout)
        report["sections"] = {
            title: {row["name"].strip(): (row["value"], row["note"]) for row in rows}
            for title, rows in report["sections"].items()
        }
        assert done.returncode == (0 if report["would_start"] else 1)
        assert done.stderr.splitlines() == [
            f"{problem['kind']}: {problem['text']}" for problem in report["problems"]
        ]
        return report


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def packages_of(report):
    return report["sections"]["packages"]


def taken_by(report):
    return report["sections"]["what a run takes"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The report on this machine as it is, for the embedded task on a CPU."""
    return Machine(tmp_path_factory.mktemp("here")).found("train.device=cpu")


def test_versions_are_those_that_are_installed(here):
    for name in ("torch", "megatron-core", "transformers", "tokenizers", "wandb"):
        assert packages_of(here)[name][0] == version(name)
    assert not [row for row in packages_of(here).values() if "BROKEN" in row[1]]


def test_what_a_run_takes_is_what_the_trainer_says(here):
    """The same words as in its dry run, and the choice that its functions make in this process."""
    from dattn_mcore.config.schema import Config
    from dattn_mcore.layers.attention import BACKENDS
    from dattn_mcore.training.dry_run import attention_backends
    from dattn_mcore.training.implementation import choose_implementation

    taken = taken_by(here)
    ((layers, choice),) = attention_backends(Config(), "cpu")
    assert taken[f"attention, {layers}"] == (choice.name, choice.reason)
    assert taken["linears and norms"][0] == choose_implementation(Config())
    assert taken["device"] == ("CPU", "train.device=cpu")
    assert {"flash", "triton", "reference"} <= set(taken) and "flash" in BACKENDS
    assert taken["flash"] == ("cannot", "it needs a GPU")
    assert taken["optimizer"][0] == "PyTorch's AdamW"
    assert taken["trackers"][0] == "tensorboard"
    assert (here["would_start"], here["problems"]) == (True, [])


def test_the_machine_is_this_one(here):
    rows = here["sections"]["machine"]
    assert rows["Python"] == (sys.version.split()[0], sys.executable)
    assert rows["OMP_NUM_THREADS"][0] == "1"
    assert rows["processors"][0] == str(len(os.sched_getaffinity(0)))
    assert {"free disk", "shared memory", "open files", "locked memory"} <= set(rows)


def test_a_table_for_people(machine):
    done = machine.doctor("--config", "configs/digits_align.yaml", *SMALL)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].endswith(": configs/digits_align.yaml") and lines[-1] == "a run would start"
    assert max(map(len, lines)) <= 118


def test_a_mistake_in_settings_is_one_line(machine):
    wrong = machine.doctor("--tpp", "2")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1


BROKEN = 'raise OSError("libx.so.12: cannot open shared object file\\nmore")\n'


@pytest.fixture(scope="module")
def ill(tmp_path_factory):
    """A machine with GPUs that PyTorch does not use, broken packages, and no compiler."""
    machine = Machine(tmp_path_factory.mktemp("ill"))
    machine.package("transformer_engine", BROKEN, "2.20.2")
    machine.package("flash_attn", "", "2.3.6")
    machine.package("flash_attn_interface", "import os\nos.kill(os.getpid(), 11)\n")
    machine.package("apex", "import sys\nsys.exit('no GPU, no Apex')\n")
    machine.package("mlflow", "raise RuntimeError('half installed')\n")
    machine.program("nvidia-smi", SMI.format(driver="570.86.15"))
    machine.path = f"{machine.programs}{os.pathsep}/bin-without-compilers"
    return machine


@pytest.fixture(scope="module")
def of_ill(ill):
    """What is found there for a run on the CPU that asks for a broken tracker."""
    return ill.found(*SMALL, "train.transformer_impl=local", "log.mlflow=true")


def test_broken_packages_are_told_in_their_own_words(of_ill):
    found = packages_of(of_ill)
    value, note = found["transformer-engine"]
    assert value == "2.20.2"
    assert note == "BROKEN, its import fails: OSError: libx.so.12: cannot open shared object file"
    assert "RuntimeError: half installed" in found["mlflow"][1]
    assert "SystemExit: no GPU, no Apex" in found["Apex"][1]
    assert "not imported, these settings do not use it" in found["wandb"][1]


def test_a_package_that_ends_its_process_ends_no_report(of_ill):
    assert "its import was ended by SIGSEGV" in packages_of(of_ill)["flash-attn 3"][1]
    assert packages_of(of_ill)["DALI"][1] == "decodes images, on a CPU too"
    assert taken_by(of_ill)["device"][0] == "CPU"


def test_a_version_that_is_too_old_is_marked(of_ill):
    value, note = packages_of(of_ill)["flash-attn 2"]
    assert value == "2.3.6" and "outside of" in note and ">=2.7" in note


def test_what_compiles_is_missed_with_the_command_that_brings_it(of_ill):
    rows = of_ill["sections"]["compilers and headers"]
    assert rows["C compiler"][0] == "not found"
    assert any("there is no C compiler; apt-get install gcc" in line for line in of_ill["missing"])
    te = "pip install --no-build-isolation 'dattn-mcore[te]'"
    assert any(line.startswith("transformer-engine, ") and te in line for line in of_ill["missing"])


def test_gpus_are_listed_as_the_driver_sees_them(of_ill):
    rows = of_ill["sections"]["GPUs and driver"]
    assert rows["GPU 1"][0] == "NVIDIA H100 80GB HBM3, 80 GiB"
    assert "driver 570.86.15" in rows["GPU 1"][1] and rows["PyTorch uses"][0] == "0 GPUs"


def test_the_verdict_is_that_of_the_trainer(ill, of_ill):
    """A broken package that these settings do not use is no reason; one that they name is."""
    settings = (*SMALL, "train.transformer_impl=local")
    trainer = ill.run("pretrain_dattn.py", "--dry-run", *settings)
    assert trainer.returncode == 0, trainer.stderr[-2000:]
    assert ill.found(*settings)["would_start"]
    assert [problem["text"].split()[0] for problem in of_ill["problems"]] == ["log.mlflow=true"]


def test_gpus_that_pytorch_does_not_use_are_no_reason_to_take_the_cpu(ill):
    """train.device=auto would take it, which nobody meant; and FP8 needs what is broken."""
    asked = ("train.device=auto", "train.precision=bf16", "train.fp8=tensorwise")
    report = ill.found(*SMALL[1:], *asked)
    texts = [problem["text"] for problem in report["problems"]]
    assert not report["would_start"]
    assert any("2 GPUs" in text or "driver" in text for text in texts)
    assert all("\n" not in text for text in texts)


def test_a_gpu_that_is_asked_for_and_absent(tmp_path):
    machine = Machine(tmp_path)
    machine.program("nvidia-smi", "#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    report = machine.found(*SMALL[1:], "train.device=gpu")
    assert not report["would_start"]
    assert report["problems"][0]["text"].startswith("train.device=gpu needs a GPU")
    rows = report["sections"]["GPUs and driver"]
    assert rows["driver"] == ("no GPU", "nvidia-smi: NVIDIA-SMI has failed")
