"""The project under both ends of the releases of Megatron-Core that pyproject.toml allows.

The release that is installed has all other tests. Here the other end gets the CPU platform's tests,
the optimizer's fixes, the oracle, a training run whose losses are those of the installed release,
and checkpoints that either reads. A fix or a replaced name that a release does without fails a test
of that release; what no release needs any more fails one of all.
"""

from __future__ import annotations

import pytest

from dattn_mcore.parallel.announcements import ANNOUNCEMENTS
from tests.megatron.releases import INSTALLED, Unavailable, ends, jobs, run

# Replaced for this project's own sake (`platform.peak_memory` and its like), or for PyTorch's Adam.
NOT_MEGATRONS = {
    "is_current_stream_capturing",
    "max_memory_allocated",
    "max_memory_reserved",
    "reset_peak_memory_stats",
}
FLOAT32 = 1e-6  # of losses of order one: the order of sums may differ between releases
ORACLE = "tests/distributed/test_oracle.py::"
CASES = [
    "tests/unit/parallel/test_platform.py",
    f"{ORACLE}test_baseline_equals_hugging_face[gemma2-first]",
    f"{ORACLE}test_baseline_in_parallel_equals_hugging_face[sp-tp2-pp2-llama]",
]


@pytest.fixture(scope="module")
def megatron():
    """Releases at the ends of the range that are not the installed one."""
    try:
        return ends()
    except Unavailable as error:
        pytest.skip(str(error))


def of_the_release(folder):
    """Jobs that ask what a release has, says and writes."""
    alone = {name: {} for name in ("version", "imports", "tried", "shims", "announcements")}
    return alone | {
        "fixes": {"data": str(folder / "fixes")},
        "own_save": {"folder": str(folder / "own_save")},
    }


@pytest.fixture(scope="module")
def here(digits, tmp_path_factory):
    """The installed release's answers, and its folder of checkpoints."""
    folder = tmp_path_factory.mktemp("here")
    asked = {
        **of_the_release(folder),
        "train": {"data": str(digits), "run_dir": str(folder / "run")},
        "save": {"data": str(folder / "saved")},
    }
    return jobs(INSTALLED, **asked), folder


@pytest.fixture(scope="module")
def there(megatron, here, digits, tmp_path_factory):
    """The same of the other ends, by release, with checkpoints of the installed release resumed."""
    found = {}
    for release in megatron:
        folder = tmp_path_factory.mktemp("there")
        asked = {
            **of_the_release(folder),
            "train": {"data": str(digits), "run_dir": str(folder / "run")},
            "resume": {"data": str(here[1] / "saved")},
            "save": {"data": str(folder / "saved")},
        }
        found[release] = (jobs(release, **asked), folder)
    return found


def check_release(answers):
    """All names are there, and what replaces or fixes something has something to replace or fix."""
    release = answers["version"]
    assert answers["imports"] == {}
    assert answers["tried"] == [], "add them to dattn_mcore/parallel/packages.py"
    needless = sorted(name for name, needed in answers["fixes"].items() if not needed)
    assert not needless, f"dattn_mcore/parallel/torch_adam.py: {release} does without: say so there"
    needless = sorted(set(answers["shims"]) - NOT_MEGATRONS)
    assert not needless, f"dattn_mcore/parallel/on_cpu.py: {release} does without: say so there"


def test_the_installed_release(here):
    assert here[0]["version"] == INSTALLED
    check_release(here[0])


def test_the_others(there):
    for release, (answers, _) in there.items():
        assert answers["version"] == release
        check_release(answers)


def test_what_is_hidden_is_said_by_a_release(here, there):
    answers = [here[0], *(answers for answers, _ in there.values())]
    said = {name for one in answers for name in one["announcements"]}
    assert said == set(ANNOUNCEMENTS), "dattn_mcore/parallel/announcements.py: no longer needed"


def test_megatron_cores_own_save_differs(here, there):
    """Of one end of the range; else `checkpoint.files.begin_save` is not needed."""
    entries = [here[0]["own_save"], *(answers["own_save"] for answers, _ in there.values())]
    assert any(entries), "dattn_mcore/checkpoint/files.py: `dist_checkpointing.save` would do"


def test_a_run_has_the_same_losses(here, there):
    for answers, _ in there.values():
        assert len(answers["train"]) == 3
        for ours, theirs in zip(here[0]["train"], answers["train"], strict=True):
            assert theirs == pytest.approx(ours, rel=FLOAT32)


def test_checkpoints_of_one_release_load_in_the_other(here, there):
    """And the next update gives the same weights, to the last bit."""
    for answers, folder in there.values():
        assert answers["resume"] == here[0]["save"]
        back = jobs(INSTALLED, resume={"data": str(folder / "saved")})
        assert back["resume"] == answers["save"]


def test_the_platform_and_the_oracle(megatron):
    for release in megatron:
        said = run(release, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CASES)
        assert "passed" in said and "skipped" not in said
