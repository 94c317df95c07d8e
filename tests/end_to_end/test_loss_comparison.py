"""`python -m benchmarks.compare_losses`, a few steps long: equal commits, and one with another seed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture
def repository(tmp_path):
    """A repository of one commit, with this code."""
    folder = tmp_path / "repository"
    for name in ("benchmarks", "configs", "dattn_mcore", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pretrain_dattn.py", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    who = ("-c", "user.name=a", "-c", "user.email=a", "-c", "commit.gpgsign=false")
    for arguments in (["init", "--quiet"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True, timeout=60)
    return folder


def compare(repository, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONPATH"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.compare_losses", *arguments],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_a_commit_equals_itself_in_three_stages_and_layouts(repository):
    done = compare(repository, "HEAD", "HEAD", "--steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("align", "pretrain", "instruct"):
        assert f"| {stage} | own | 2 | equal |" in done.stdout
    listed = ["git", "worktree", "list"]
    left = subprocess.run(listed, cwd=repository, capture_output=True, text=True, check=True)
    assert len(left.stdout.splitlines()) == 1


def test_another_seed_is_found(repository):
    """In the working tree, which is compared with its changes."""
    settings = repository / "configs/digits_base.yaml"
    text = settings.read_text()
    assert text.count("seed: 1234") == 1
    settings.write_text(text.replace("seed: 1234", "seed: 7"))
    options = ("--steps", "2", "--until", "align", "--layouts", "one")
    done = compare(repository, "HEAD", *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "| align | one | 2 | step 1: loss " in done.stdout and " apart" in done.stdout
    assert "HEAD the working tree (" in done.stdout and " and changes)" in done.stdout
    done = compare(repository, "HEAD", *options, "--seed", "5")
    assert done.returncode == 0, done.stdout + done.stderr
