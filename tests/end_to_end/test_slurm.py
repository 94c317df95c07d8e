"""`sbatch examples/slurm/gemma_pt.sbatch` on a real Slurm: stopped in every way, it goes on."""

import json
import signal
import sys
from pathlib import Path

import pytest
import yaml

from tests.distributed.jobs import read_metrics
from tests.distributed.small_models import SMALL_MODEL
from tests.end_to_end.slurm_cluster import Cluster, kill, missing_programs, wait_until

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples/slurm"
STEPS = 24
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

missing = missing_programs()
pytestmark = pytest.mark.skipif(
    bool(missing),
    reason=f"Slurm is not installed (no {', '.join(missing)}): apt-get install slurmctld slurmd "
    "slurm-client munge",
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def configuration(cluster, digits):
    """gemma_pt.yaml with small sizes, the digits data, and a layout that spans both nodes."""
    tree = {
        "base": str(ROOT / "configs/gemma_pt.yaml"),
        "model": {
            "llm": {**SMALL_MODEL["llm"], "vocab_size": 384, "query_scale": 16.0}
            | {"sliding_window": 6},
            "vision": {**SMALL_MODEL["vision"], "image_size": 56},
            "projector": SMALL_MODEL["projector"],
        },
        "parallel": {"tp": 2, "pp": 2},
        "data": {
            "annotations": str(digits / "pretrain.json"),
            "image_folder": str(digits / "images"),
            "tokenizer": str(digits / "tokenizer.model"),
            "step_packs_multiple": None,  # so small a batch fills no 16 packs
            "text_budget": 128,
            "visual_budget": 128,
            "image_backend": "pillow",
        },
        "optim": {"lr": 3e-3},
        "train": {"steps": STEPS, "global_batch_size": 8, "device": "cpu", "fp8": "none"},
        "checkpoint": {"init_from": None, "save_interval": 4},
        "log": {"interval": 1, "tensorboard": False},
    }
    path = cluster.folder / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


class Job:
    """A submitted gemma_pt.sbatch with 2 nodes x 2 ranks."""

    def __init__(self, cluster, configuration, name, *arguments):
        self.cluster, self.run_dir = cluster, cluster.folder / name
        self.output = cluster.folder / f"{name}.out"
        self.number = cluster.run(
            "sbatch",
            "--parsable",
            "--nodes=2",
            "--ntasks-per-node=2",
            "--gpus-per-node=2",
            "--cpus-per-task=1",
            "--time=60",
            f"--job-name={name}",
            f"--output={self.output}",
            str(FOLDER / "gemma_pt.sbatch"),
            "--config",
            str(configuration),
            f"log.run_dir={self.run_dir}",
            *arguments,
            cwd=cluster.folder,
            environment={"DATTN_REPO": str(ROOT), "DATTN_VENV": sys.prefix},
        ).stdout.strip()

    def state(self):
        return self.cluster.job(self.number)["JobState"]

    def ended(self):
        return self.state() in ENDED

    def steps(self):
        """Steps reported so far."""
        try:
            return len((self.run_dir / "metrics.jsonl").read_text().splitlines())
        except FileNotFoundError:
            return 0

    def log(self, restart):
        """What rank 0 said in one of the job's lives."""
        path = self.run_dir / f"logs/{self.number}.{restart}/rank-0000.log"
        return path.read_text() if path.exists() else ""

    def hold(self, restart, steps=3):
        """Lets a life of the job do some steps, then stops one rank, so that all wait for it.

        Time stands still for the run, however slow this machine is. Returns the first step.
        """

        def first_step():
            assert not self.ended(), self.output.read_text()
            if restart == 0:
                return [0]
            words = self.log(restart).partition("resumed at step ")[2].split()
            return words and [int(words[0])]

        (first,) = wait_until(first_step, f"life {restart} of the job")
        wait_until(lambda: self.steps() >= first + steps, f"{steps} steps")
        ranks = self.ranks(3)
        assert len(ranks) == 1
        kill(ranks, signal.SIGSTOP)
        assert self.steps() < STEPS
        return first

    def ranks(self, rank):
        return self.cluster.processes(SLURM_JOB_ID=self.number, RANK=str(rank))

    def go_on(self, restart):
        """Waits until the job is back in the queue, and lets it start without Slurm's delay."""

        def queued():
            job = self.cluster.job(self.number)
            return (job["Restarts"], job["JobState"]) == (str(restart), "PENDING")

        wait_until(queued, "the job to be queued again")
        saved = sorted(path.name for path in (self.run_dir / "checkpoints").glob("step_*[0-9]"))
        # Node daemons refuse a new life that starts in the second in which the old one ended.
        self.cluster.update(f"JobId={self.number}", StartTime="now+2", TimeLimit=60)
        return int(saved[-1].removeprefix("step_"))


def submit_stages(cluster, name, **environment):
    """submit.sh as a user types it; returns the three jobs' numbers and a pattern of outputs."""
    result = cluster.run(
        "bash",
        str(FOLDER / "submit.sh"),
        "gemma",
        "--",
        f"--output={cluster.folder}/{name}-%x.out",
        environment={"DATTN_VENV": sys.prefix, **environment},
    )
    return [line.split()[0] for line in result.stdout.splitlines()]


def test_the_chain_of_stages_at_its_true_size(cluster):
    """Unchanged files on 4 nodes x 8 GPUs, as dry runs, one after the other."""
    jobs = submit_stages(cluster, "chain", DATTN_DRY_RUN="1")
    wait_until(lambda: cluster.job(jobs[2])["JobState"] in ENDED, "the last stage")
    found = [cluster.job(job) for job in jobs]
    assert [job["JobState"] for job in found] == ["COMPLETED"] * 3
    assert found[0]["EndTime"] <= found[1]["StartTime"] <= found[1]["EndTime"]
    assert found[1]["EndTime"] <= found[2]["StartTime"]
    for job, stage in zip(found, ("aln", "pt", "it"), strict=True):
        assert job["NumNodes"] == "4" and "gres:gpu:8" in job["TresPerNode"]
        text = (cluster.folder / f"chain-gemma_{stage}.out").read_text()
        assert "layout: 32 processes = tp 2 x pp 1 x dp 16, sequence parallel" in text
        assert f"--config configs/gemma_{stage}.yaml" in text


def test_a_failed_stage_takes_the_others_out_of_the_queue(cluster):
    jobs = submit_stages(cluster, "broken", DATTN_DRY_RUN="1", DATTN_VENV="/nowhere")
    wait_until(lambda: cluster.job(jobs[2])["JobState"] in ENDED, "the last stage")
    assert [cluster.job(job)["JobState"] for job in jobs] == ["FAILED", "CANCELLED", "CANCELLED"]
    text = (cluster.folder / "broken-gemma_aln.out").read_text()
    assert text.startswith("error: VENV=/nowhere has no bin/python") and text.count("\n") == 1


def test_a_mistake_is_reported_once_and_does_not_come_back(cluster, configuration):
    job = Job(cluster, configuration, "mistake", "optim.lrr=1")
    wait_until(job.ended, "the job to end")
    assert (job.state(), cluster.job(job.number)["Restarts"]) == ("FAILED", "0")
    errors = [li for li in job.output.read_text().splitlines() if li.startswith("error:")]
    assert errors == ["error: unknown configuration key 'optim.lrr'; did you mean 'optim.lr'?"]


def test_a_cancelled_job_does_not_come_back(cluster, configuration):
    job = Job(cluster, configuration, "cancelled")
    wait_until(lambda: len(job.ranks(3)) == 1, "the ranks")
    cluster.run("scancel", job.number)
    wait_until(job.ended, "the job to end")
    wait_until(lambda: not cluster.processes(SLURM_JOB_ID=job.number), "its processes to end")
    assert (job.state(), cluster.job(job.number)["Restarts"]) == ("CANCELLED", "0")
    assert "back into the queue" not in job.output.read_text()


@pytest.fixture(scope="module")
def lives(cluster, configuration):
    """An undisturbed job, and one beside it that is stopped in four ways; both have ended."""
    whole = Job(cluster, configuration, "whole")
    job = Job(cluster, configuration, "disturbed")
    saved = []
    try:
        # The time limit comes near: Slurm sends SIGUSR1 to the batch script, 600 s before it.
        job.hold(0)
        cluster.update(f"JobId={job.number}", TimeLimit=10)
        wait_until(lambda: "SIGUSR1: asking all ranks" in job.output.read_text(), "the signal")
        kill(job.ranks(3), signal.SIGCONT)
        saved.append(job.go_on(1))

        # A job of a higher partition wants the nodes: SIGTERM to the ranks, then time to save.
        job.hold(1)
        nodes = cluster.job(job.number)["NodeList"]
        urgent = cluster.run(
            "sbatch",
            "--parsable",
            "--partition=high",
            f"--nodelist={nodes}",
            "--exclusive",
            f"--output={cluster.folder}/urgent.out",
            "--wrap=sleep 1",
        ).stdout.strip()
        saved.append(job.go_on(2))
        wait_until(lambda: cluster.job(urgent)["JobState"] == "COMPLETED", "the urgent job")

        # Somebody requeues the job: Slurm stops it and puts it into the queue by itself.
        job.hold(2)
        cluster.run("scontrol", "requeue", job.number)
        saved.append(job.go_on(3))

        # A node dies with all that runs on it, after the run has saved in this life.
        job.hold(3, steps=5)
        node = cluster.job(job.number)["NodeList"].rstrip("]")[-1]
        cluster.crash(f"n{node}")
        saved.append(job.go_on(4))
        for one in (whole, job):
            wait_until(one.ended, "the jobs to end")
        cluster.repair(f"n{node}")
    except BaseException:
        logs = ("disturbed.out", "*/logs/*/rank-*.log", "log/slurm*.log")
        for path in [path for pattern in logs for path in cluster.folder.glob(pattern)]:
            print(f"== {path}\n{path.read_text()[-3000:]}")  # pytest shows it with the failure
        raise
    return whole, job, saved


def test_both_jobs_completed(lives, cluster):
    whole, job, _ = lives
    assert (whole.state(), job.state()) == ("COMPLETED", "COMPLETED")
    assert job.output.read_text().splitlines()[-1].endswith("finished")


@pytest.mark.parametrize("life", [1, 2, 3, 4], ids=["time-limit", "preempted", "requeued", "node"])
def test_each_life_starts_from_the_newest_checkpoint(lives, life):
    _, job, saved = lives
    assert f"resumed at step {saved[life - 1]} of {STEPS}" in job.log(life)


@pytest.mark.parametrize("life", [0, 1], ids=["time-limit", "preempted"])
def test_a_warned_run_saves_where_it_stands(lives, life):
    """No step is lost: the last step that was reported is the one that was saved."""
    _, job, saved = lives
    log = job.log(life)
    assert f"stopped by a signal at step {saved[life]} of {STEPS}" in log
    assert [line for line in log.splitlines() if line.startswith("step ")][-1].startswith(
        f"step {saved[life]:>2}/{STEPS}"
    )


def test_a_dead_node_costs_no_more_than_the_steps_since_the_last_save(lives):
    _, job, saved = lives
    assert "stopped by a signal" not in job.log(3)
    assert saved[3] % 4 == 0


def test_losses_are_those_of_the_undisturbed_run(lives):
    """To the last bit, for every step; and every sample was seen in its turn."""
    whole, job, _ = lives
    names = ("step", "loss", "grad_norm", "lr", "supervised_tokens")
    rows, expected = (
        [[row[name] for name in names] for row in read_metrics(one.run_dir)] for one in (job, whole)
    )
    assert [row[0] for row in rows] == list(range(1, STEPS + 1))
    assert rows == expected
    assert len({row[1] for row in rows}) > STEPS // 2
    samples = [
        [json.loads(line) for line in (one.run_dir / "samples.jsonl").read_text().splitlines()]
        for one in (job, whole)
    ]
    assert samples[0] == samples[1]


def test_every_rank_has_a_log_of_its_own(lives):
    whole, _, _ = lives
    logs = sorted((whole.run_dir / f"logs/{whole.number}.0").glob("rank-*.log"))
    assert [path.name for path in logs] == [f"rank-000{rank}.log" for rank in range(4)]
    assert "on 4 CPU processes, tp 2 x pp 2 x dp 1, sequence parallel" in logs[0].read_text()


def test_the_doctor_looked_at_both_nodes_in_every_life(lives):
    whole, job, _ = lives
    for one, life in ((whole, 0), *((job, life) for life in range(5))):
        reports = sorted((one.run_dir / f"logs/{one.number}.{life}").glob("doctor-*.log"))
        assert len(reports) == 2, life
        assert all("\na run would start\n" in path.read_text() for path in reports)
    assert whole.output.read_text().count("\na run would start\n") == 1
