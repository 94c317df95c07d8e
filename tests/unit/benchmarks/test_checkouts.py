"""Commits in worktrees of their own, which go again."""

import os
import shutil
import subprocess

import pytest

from benchmarks.checkouts import checked_out
from dattn_mcore.errors import ConfigError

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture
def git(tmp_path):
    """Calls git in a repository of two commits; its code says which it is."""
    repository = tmp_path / "repository"
    repository.mkdir()
    who = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a", "GIT_COMMITTER_NAME": "a"}
    own = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_COMMITTER_EMAIL": "a", **who}

    def call(*arguments):
        done = subprocess.run(
            ["git", *arguments],
            cwd=repository,
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    call.repository = repository
    call("init", "--quiet")
    package = repository / "dattn_mcore"
    package.mkdir()
    for text in ("first", "second"):
        (package / "__init__.py").write_text(f"name = '{text}'\n")
        call("add", ".")
        call("commit", "--quiet", "--message", text)
    return call


def code(checkout):
    return (checkout.folder / "dattn_mcore/__init__.py").read_text()


def test_commits_stand_side_by_side_and_go(git, tmp_path):
    short = git("rev-parse", "--short", "HEAD~1")
    with (
        checked_out("HEAD~1", tmp_path / "base", git.repository) as base,
        checked_out(short, tmp_path / "again", git.repository) as again,
        checked_out("HEAD", tmp_path / "head", git.repository) as head,
    ):
        assert code(base) == code(again) == "name = 'first'\n" and code(head) == "name = 'second'\n"
        assert (base.name, again.name) == (f"HEAD~1 ({short})", short)
        assert len(git("worktree", "list").splitlines()) == 4
    assert len(git("worktree", "list").splitlines()) == 1
    assert not any((tmp_path / name).exists() for name in ("base", "again", "head"))


def test_a_worktree_goes_after_an_error_too(git, tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        checked_out("HEAD", tmp_path / "head", git.repository) as head,
    ):
        (head.folder / "left.txt").write_text("by a run")
        raise KeyboardInterrupt
    assert len(git("worktree", "list").splitlines()) == 1 and not (tmp_path / "head").exists()


def test_the_working_tree_is_taken_as_it_is(git, tmp_path):
    (git.repository / "dattn_mcore/__init__.py").write_text("name = 'changed'\n")
    short = git("rev-parse", "--short", "HEAD")
    with checked_out(".", tmp_path / "head", git.repository) as head:
        assert code(head) == "name = 'changed'\n" and head.folder == git.repository
        assert head.name == f"the working tree ({short} and changes)"
    assert code(head) == "name = 'changed'\n"


@pytest.mark.parametrize("name", ["v9", "0000000", "HEAD:dattn_mcore"])
def test_an_unknown_commit_is_one_line(git, tmp_path, name):
    with (
        pytest.raises(ConfigError, match=f"'{name}' is no commit, branch or tag of ") as error,
        checked_out(name, tmp_path / "head", git.repository),
    ):
        pass
    assert "\n" not in str(error.value) and "git rev-parse: " in str(error.value)


def test_a_folder_without_a_repository_is_one_line(tmp_path):
    with (
        pytest.raises(ConfigError, match="not a git repository"),
        checked_out("HEAD", tmp_path / "head", tmp_path),
    ):
        pass


def test_code_that_is_installed_is_not_taken_for_the_commit_s(git, tmp_path):
    git("mv", "dattn_mcore", "other")
    git("commit", "--quiet", "--message", "third")
    with (
        pytest.raises(ConfigError, match="in its folder Python does not find its dattn_mcore"),
        checked_out("HEAD", tmp_path / "head", git.repository),
    ):
        pass
    assert len(git("worktree", "list").splitlines()) == 1
