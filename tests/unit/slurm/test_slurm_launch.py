"""The life of a job: the real batch script, with stand-ins for Slurm's two commands."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "examples/slurm"

# Records how it was started, then does what the test says; says which signals it got.
SRUN = """#!/usr/bin/env bash
if [[ " $* " == *" dattn_mcore.doctor "* ]]; then
  printf '%s\\n' "$@" > "$TEST_FOLDER/doctor"
  trap 'echo USR1 >> "$TEST_FOLDER/signals"; exit 138' USR1
  [[ ! -e $TEST_FOLDER/doctor_step ]] || source "$TEST_FOLDER/doctor_step"
  exit 0
fi
printf '%s\\n' "$@" > "$TEST_FOLDER/srun"
printf '%s\\n' "$MASTER_ADDR:$MASTER_PORT" "$WORLD_SIZE" "$LOCAL_WORLD_SIZE" > "$TEST_FOLDER/world"
trap 'echo USR1 >> "$TEST_FOLDER/signals"' USR1
trap 'echo TERM >> "$TEST_FOLDER/signals"' TERM
touch "$TEST_FOLDER/started"
source "$TEST_FOLDER/step"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2 $3" in
  "show hostnames "*) printf '%s\\n' node7 node8 ;;
  "--oneliner show node") echo "NodeName=$4 Arch=x NodeAddr=10.0.0.7 NodeHostName=$4" ;;
  "--oneliner show job") cat "$TEST_FOLDER/job" ;;
  "requeue 4711 ") echo requeued > "$TEST_FOLDER/requeued" ;;
  *) exit 9 ;;
esac
"""
WAIT_FOR_SIGNAL = 'until [[ -e $TEST_FOLDER/signals ]]; do sleep 0.02; done; exit "$1"'


@pytest.fixture
def job(tmp_path):
    """A job on two nodes whose `srun` and `scontrol` are stand-ins."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    return Job(tmp_path)


class Job:
    def __init__(self, folder):
        self.folder, self.run_dir = folder, folder / "run dir"
        self.environment = {
            "PATH": f"{folder}/bin:/usr/bin:/bin",
            "TEST_FOLDER": str(folder),
            "DATTN_VENV": sys.prefix,
            "DATTN_REPO": str(ROOT),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_JOB_NODELIST": "node[7-8]",
        }

    def start(self, step, state="RUNNING", preempted="None", **environment):
        (self.folder / "step").write_text(step)
        (self.folder / "job").write_text(
            f"JobId=4711 JobState={state} Reason=None PreemptTime={preempted} Requeue=1"
        )
        return subprocess.Popen(
            ["bash", str(FOLDER / "gemma_pt.sbatch"), f"log.run_dir={self.run_dir}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env={**self.environment, **environment},
        )

    def run(self, step, **options):
        process = self.start(step, **options)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def stop(self, number, step, **options):
        """Sends a signal to the batch script once its step has started."""
        process = self.start(step, **options)
        end = time.monotonic() + 60
        while not (self.folder / "started").exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    @property
    def requeued(self):
        return (self.folder / "requeued").exists()

    def read(self, name):
        return (self.folder / name).read_text().splitlines()


FINISH = 'echo "{{}}" > "{}/finished.json"'


def test_a_finished_run_is_done(job):
    status, out, err = job.run(FINISH.format(job.run_dir))
    assert (status, err, job.requeued) == (0, "", False)
    assert out.splitlines()[-1].endswith("finished")


def test_ranks_are_given_their_place(job):
    job.run(FINISH.format(job.run_dir))
    assert job.read("world") == ["10.0.0.7:24711", "4", "2"]
    words = job.read("srun")
    assert words[:3] == ["--nodes=2", "--ntasks=4", "--ntasks-per-node=2"]
    assert f"--output={job.run_dir}/logs/4711.0/rank-%4t.log" in words
    assert words[-5:] == [
        f"{sys.prefix}/bin/python",
        "pretrain_dattn.py",
        "--config",
        "configs/gemma_pt.yaml",
        f"log.run_dir={job.run_dir}",
    ]


def test_a_rank_takes_its_place_from_slurm(tmp_path):
    script = "import os, json; print(json.dumps([os.environ[k] for k in ('RANK', 'LOCAL_RANK')]))"
    out = subprocess.run(
        ["bash", str(FOLDER / "rank.sh"), sys.executable, "-c", script],
        env={**os.environ, "SLURM_PROCID": "5", "SLURM_LOCALID": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert json.loads(out) == ["5", "1"]


def test_a_run_that_saved_and_stopped_comes_back(job):
    """The ranks alone got the signal to stop: they exit with 0 and the run is not finished."""
    status, out, err = job.run("exit 0")
    assert (status, err, job.requeued) == (0, "", True)
    assert "back into the queue" in out


def test_the_mark_of_an_earlier_run_does_not_count(job):
    job.run_dir.mkdir()
    (job.run_dir / "finished.json").write_text("{}")
    assert job.run("exit 0")[0] == 0
    assert job.requeued


SAYS = """for node in {nodes}; do
  echo "table of $node"; echo "{line}"
  printf '%s\\n' "table of $node" "{line}" > "{logs}/doctor-$node-0.log"
done > /dev/null
exit {status}
"""
BROKEN = "error: train.fp8=tensorwise needs Transformer Engine, and it is not installed"


def doctor_says(job, nodes, line, status):
    text = SAYS.format(nodes=nodes, line=line, status=status, logs=f"{job.run_dir}/logs/4711.0")
    (job.folder / "doctor_step").write_text(text)


def test_the_doctor_looks_at_every_node_before_the_first_step(job):
    doctor_says(job, "node7 node8", "a run would start", 0)
    status, out, err = job.run(FINISH.format(job.run_dir))
    assert (status, err) == (0, "")
    words = job.read("doctor")
    assert words[:3] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    assert f"--output={job.run_dir}/logs/4711.0/doctor-%N-%n.log" in words
    assert words[-6:] == [
        f"{sys.prefix}/bin/python",
        "-m",
        "dattn_mcore.doctor",
        "--config",
        "configs/gemma_pt.yaml",
        f"log.run_dir={job.run_dir}",
    ]
    assert "table of node7\na run would start\n" in out and "table of node8" not in out


def test_a_doctor_that_finds_a_mistake_ends_the_job_with_its_line(job):
    doctor_says(job, "node7 node8", BROKEN, 1)
    status, out, err = job.run("exit 0")
    assert (status, err, job.requeued) == (1, f"{BROKEN}\n", False)
    assert "table of node7" in out and not (job.folder / "started").exists()


@pytest.mark.parametrize(
    "line", [BROKEN, "fault: GPU 3 does not compute (uncorrectable ECC error)"]
)
def test_a_node_that_is_not_like_the_others_is_tried_again(job, line):
    doctor_says(job, "node8", line, 1)
    status, out, err = job.run("exit 0")
    assert (status, err, job.requeued) == (0, f"{line}\n", True)
    assert "tried again" in out and not (job.folder / "started").exists()
    assert ("of 2 nodes node8 alone" in out) == line.startswith("error")


def test_a_doctor_that_says_nothing_ends_the_job(job):
    doctor_says(job, "node7 node8", "srun: error: cannot start", 1)
    assert job.run("exit 0")[0] == 1
    assert not job.requeued and not (job.folder / "started").exists()


def test_a_signal_while_the_doctor_looks_comes_back(job):
    (job.folder / "doctor_step").write_text(
        'touch "$TEST_FOLDER/started"; sleep 60 >/dev/null 2>&1 & wait\n'
    )
    status, _, _ = job.stop(signal.SIGUSR1, "exit 0")
    assert (status, job.requeued, job.read("signals")) == (0, True, ["USR1"])


def test_the_doctor_can_be_left_out(job):
    assert job.run(FINISH.format(job.run_dir), DATTN_DOCTOR="0")[0] == 0
    assert not (job.folder / "doctor").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("status_of_step", [0, 138])
def test_a_signal_to_the_script_reaches_the_ranks_and_the_job_comes_back(
    job, number, status_of_step
):
    """Always as SIGUSR1: srun would end its step on SIGTERM. Status 138: killed while importing."""
    step = WAIT_FOR_SIGNAL.replace('"$1"', str(status_of_step))
    status, _, err = job.stop(number, step)
    assert (status, err, job.requeued) == (0, "", True)
    assert job.read("signals") == ["USR1"]


def test_a_signal_during_the_last_save_is_no_reason_to_come_back(job):
    step = FINISH.format(job.run_dir) + "; " + WAIT_FOR_SIGNAL.replace('"$1"', "0")
    status, out, _ = job.stop(signal.SIGUSR1, step)
    assert (status, job.requeued) == (0, False)
    assert out.splitlines()[-1].endswith("finished")


def test_a_failure_ends_the_job_with_its_reason(job):
    log = f"{job.run_dir}/logs/4711.0/rank-0000.log"
    status, out, err = job.run(f'echo "error: data.annotations=x is missing" > "{log}"; exit 2')
    assert (status, job.requeued) == (2, False)
    assert err == "error: data.annotations=x is missing\n"
    assert "failed with status 2" in out


def test_a_crash_comes_back_if_the_run_got_on(job):
    """As when a node dies and its peers notice before Slurm does."""
    (job.run_dir / "checkpoints/step_00000500").mkdir(parents=True)
    assert job.run("exit 137")[0] == 137
    assert not job.requeued
    for name in ("step_00001000.tmp", "step_best2", "step_00001000_backup1", "step_9"):
        assert job.run(f'mkdir "{job.run_dir}/checkpoints/{name}"; exit 137')[0] == 137
        assert not job.requeued, name
    assert job.run(f'mkdir "{job.run_dir}/checkpoints/step_00001000"; exit 137')[0] == 0
    assert job.requeued


def test_a_mistake_does_not_come_back_though_the_run_got_on(job):
    log = f"{job.run_dir}/logs/4711.0/rank-0000.log"
    save = f'mkdir -p "{job.run_dir}/checkpoints/step_00001000"'
    status, _, _ = job.run(f'{save}; echo "error: the disk is full" > "{log}"; exit 2')
    assert (status, job.requeued) == (2, False)


NOT_JOINED = "fault: rank 3 on node8 cannot join the run at 10.0.0.7:24711 within 120 seconds"
HUNG = "hung: rank 3 on node8: the first all-reduce takes longer than {} seconds (120 so far)"


@pytest.mark.parametrize(
    ("said", "comes_back"),
    [
        ([NOT_JOINED], True),
        ([HUNG.format("health.start_timeout_seconds=120")], True),
        ([HUNG.format("health.step_timeout_seconds=480")], False),
        ([f"{NOT_JOINED} ({number})" for number in range(4000)], True),
        ([NOT_JOINED, "error: data.annotations=x is missing"], False),
    ],
    ids=["fault", "hung-at-start", "hung-in-step", "many", "mistake-too"],
)
def test_a_faulty_machine_at_the_start_is_no_reason_to_give_up(job, said, comes_back):
    """Nothing was saved since the start; the ranks say whose fault it is."""
    (job.folder / "said").write_text("".join(f"{line}\n" for line in said))
    log = f"{job.run_dir}/logs/4711.0/rank-0003.log"
    status, out, err = job.run(f'cp "{job.folder}/said" "{log}"; exit 4')
    assert (status, job.requeued) == ((0, True) if comes_back else (4, False))
    assert err.count("\n") <= 5
    if comes_back:
        assert err.startswith(said[0]) and "tried again" in out
    elif said[-1].startswith("error: "):
        assert err == f"{said[-1]}\n"


def test_faults_count_as_restarts(job):
    log = f"{job.run_dir}/logs/4711.3/rank-0000.log"
    step = f'echo "{NOT_JOINED}" > "{log}"; exit 4'
    status, _, err = job.run(step, SLURM_RESTART_COUNT="3", DATTN_MAX_RESTARTS="3")
    assert (status, job.requeued) == (2, False)
    assert err.splitlines()[0] == NOT_JOINED and "3 restarts are enough" in err


def test_preempted_while_importing_comes_back(job):
    """Slurm sent the signal to the ranks alone, which died of it: the job's PreemptTime shows it."""
    status, _, _ = job.run("exit 143", preempted="2026-01-31T10:00:00")
    assert (status, job.requeued) == (0, True)


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING"])
def test_what_slurm_has_decided_stays(job, state):
    """A cancelled job must not come back, and one that Slurm requeued not twice."""
    status, out, _ = job.stop(signal.SIGTERM, WAIT_FOR_SIGNAL.replace('"$1"', "0"), state=state)
    assert (status, job.requeued) == (1, False)
    assert "Slurm has cancelled or requeued the job itself" in out


def test_a_job_does_not_come_back_for_ever(job):
    status, _, err = job.run("exit 0", SLURM_RESTART_COUNT="3", DATTN_MAX_RESTARTS="3")
    assert (status, job.requeued) == (2, False)
    assert err.startswith("error: stopped before it was done") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("runtime", "expected"),
    [
        (
            "pyxis",
            [
                "--container-image=/images/my image",
                "--container-mounts={0}:{0},/data:/data",
                "--container-workdir={0}",
                "bash",
                "{0}/examples/slurm/rank.sh",
                "python3",
            ],
        ),
        (
            "apptainer",
            [
                "apptainer",
                "exec",
                "--nv",
                "--bind",
                "{0}:{0},/data:/data",
                "--pwd",
                "{0}",
                "/images/my image",
                "bash",
                "{0}/examples/slurm/rank.sh",
                "python3",
            ],
        ),
    ],
)
def test_in_a_container(job, runtime, expected):
    status, _, err = job.run(
        FINISH.format(job.run_dir),
        DATTN_CONTAINER="/images/my image",
        DATTN_CONTAINER_RUNTIME=runtime,
        DATTN_CONTAINER_MOUNTS="/data:/data",
    )
    assert (status, err) == (0, "")
    words = job.read("srun")
    first = words.index(expected[0].format(ROOT))
    assert words[first : first + len(expected)] == [word.format(ROOT) for word in expected]


def test_the_environment_file_is_read_first(job):
    (job.folder / "site env.sh").write_text("export MASTER_ADDR=ib-node7\n")
    job.run(FINISH.format(job.run_dir), DATTN_ENV_FILE=str(job.folder / "site env.sh"))
    assert job.read("world")[0] == "ib-node7:24711"


SBATCH = """#!/usr/bin/env bash
printf '%s|' "$@" >> "$TEST_FOLDER/sbatch"; echo >> "$TEST_FOLDER/sbatch"
echo "$(( $(wc -l < "$TEST_FOLDER/sbatch") + 100 ));cluster"
"""


def submit(job, *arguments, folder=FOLDER):
    (job.folder / "bin/sbatch").write_text(SBATCH)
    (job.folder / "bin/sbatch").chmod(0o755)
    return subprocess.run(
        ["bash", str(folder / "submit.sh"), *arguments],
        capture_output=True,
        text=True,
        cwd=job.folder,
        env=job.environment,
    )


def test_one_command_submits_the_three_stages(job):
    result = submit(job, "gemma", "--", "--nodes=16", "--comment=two words")
    assert (result.returncode, result.stderr) == (0, "")
    flags = "--nodes=16|--comment=two words"
    after = "--parsable|--dependency=afterok:{}|--kill-on-invalid-dep=yes|" + flags
    assert job.read("sbatch") == [
        f"--parsable|{flags}|{FOLDER}/gemma_aln.sbatch|",
        f"{after.format(101)}|{FOLDER}/gemma_pt.sbatch|",
        f"{after.format(102)}|{FOLDER}/gemma_it.sbatch|",
    ]
    assert result.stdout.splitlines()[1] == "102  gemma_pt  after 101"


@pytest.mark.parametrize("model", ["mistral", "gemma3_4b"])
def test_stages_can_be_named(job, model):
    result = submit(job, model, "import", "aln", "pt", "it", "export", "eval")
    assert result.returncode == 0, result.stderr
    assert [line.split("/")[-1] for line in job.read("sbatch")] == [
        f"{model}_{stage}.sbatch|" for stage in ("import", "aln", "pt", "it", "export", "eval")
    ]


KNOWN = "use one of: gemma3_4b gemma llama3_1_8b mistral qwen3_8b"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], f"model '' is unknown; {KNOWN}"),
        (["llama"], f"model 'llama' is unknown; {KNOWN}"),
        (["gemma mistral"], f"model 'gemma mistral' is unknown; {KNOWN}"),
        (["*"], f"model '*' is unknown; {KNOWN}"),
        (
            ["gemma", "sft"],
            "stage 'sft' of gemma is unknown; use import, aln, pt, it, export or eval",
        ),
    ],
    ids=["none", "unknown", "two", "star", "stage"],
)
def test_unknown_models_and_stages_submit_nothing(job, arguments, message):
    result = submit(job, *arguments)
    assert (result.returncode, result.stderr) == (2, f"error: {message}\n")
    assert not (job.folder / "sbatch").exists()


def test_a_file_of_a_further_model_is_all_that_submit_needs(job):
    """A folder with one more model: submit.sh knows it by its files."""
    folder = job.folder / "examples/slurm"
    shutil.copytree(FOLDER, folder)
    for stage in ("aln", "pt", "it"):
        text = (folder / f"gemma_{stage}.sbatch").read_text()
        (folder / f"other_1b_{stage}.sbatch").write_text(text.replace("gemma", "other_1b"))
    assert submit(job, "other_1b", folder=folder).returncode == 0
    assert [line.split("/")[-1] for line in job.read("sbatch")] == [
        f"other_1b_{stage}.sbatch|" for stage in ("aln", "pt", "it")
    ]


# A batch file of before stages.sh: it sets everything itself and sources launch.sh.
FORMER = """#!/usr/bin/env bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
set -euo pipefail
CONFIG=configs/gemma_pt.yaml
RUN_DIR=runs/mine
REPO=${DATTN_REPO:-${SLURM_SUBMIT_DIR:-$PWD}}
VENV=%s
CONTAINER=
CONTAINER_RUNTIME=pyxis
CONTAINER_MOUNTS=
ENV_FILE=
MAX_RESTARTS=3
source "$REPO/examples/slurm/launch.sh"
launch_training "$@"
"""


def test_a_users_own_file_of_before_goes_on_working(job):
    file = job.folder / "mine.sbatch"
    file.write_text(FORMER % sys.prefix)
    command = ["bash", str(file), f"log.run_dir={job.run_dir}"]
    (job.folder / "step").write_text("exit 0")
    (job.folder / "job").write_text("JobId=4711 JobState=RUNNING PreemptTime=None")
    counted = {**job.environment, "SLURM_RESTART_COUNT": "3"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=job.folder, env=counted)
    assert done.returncode == 2 and "3 restarts are enough" in done.stderr  # its own MAX_RESTARTS
    outside = {"PATH": "/usr/bin:/bin", "DATTN_REPO": str(ROOT)}
    dry = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, env=outside)
    assert dry.returncode == 0, dry.stderr
    assert "ranks: 2 nodes x 4 = 8\n" in dry.stdout
