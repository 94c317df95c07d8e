"""The project under both ends of the releases of Megatron-Core that pyproject.toml allows.

The release that is installed has all other tests. Here the other end gets the CPU platform's tests,
the optimizer's fixes, the oracle, a training run whose losses are those of the installed release,
and checkpoints that either reads. Fixes and replaced names that a release does not need fail a
test, under either release.
"""

from __future__ import annotations

import pytest

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


@pytest.fixture(scope="module")
def here(digits, tmp_path_factory):
    """The installed release's answers, and its folder of checkpoints."""
    folder = tmp_path_factory.mktemp("here")
    asked = {
        "shims": {},
        "fixes": {"data": str(folder / "fixes")},
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
            "version": {},
            "imports": {},
            "shims": {},
            "fixes": {"data": str(folder / "fixes")},
            "train": {"data": str(digits), "run_dir": str(folder / "run")},
            "resume": {"data": str(here[1] / "saved")},
            "save": {"data": str(folder / "saved")},
        }
        found[release] = (jobs(release, **asked), folder)
    return found


def check_what_is_needed(answers):
    needless = sorted(name for name, needed in answers["fixes"].items() if not needed)
    assert not needless, "dattn_mcore/parallel/torch_adam.py: no longer needed"
    assert set(answers["shims"]) <= NOT_MEGATRONS, "dattn_mcore/parallel/platform.py: not needed"


def test_all_fixes_are_needed_here(here):
    check_what_is_needed(here[0])


def test_all_names_are_there_and_all_fixes_needed(there):
    for release, (answers, _) in there.items():
        assert answers["version"] == release
        assert answers["imports"] == {}
        check_what_is_needed(answers)


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
