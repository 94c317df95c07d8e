"""Exports under the releases of transformers on both sides of each change that concerns them.

Every architecture's export is loaded as remote code, in a process without this package, by each of
the releases of `releases.py`. It must say what the trainer's Megatron-Core model says: cached and
uncached, batched and alone, without images, and over two turns. `checker.py` lists the checks and
their bounds. `DATTN_MATRIX_NEWEST=1` adds the newest release of the index.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from packaging.version import Version

from dattn_mcore.hf import TESTED_TRANSFORMERS
from tests.installed import Unavailable
from tests.matrix import releases
from tests.matrix.checker import CHECKS
from tests.matrix.exports import ARCHITECTURES, make_export
from tests.matrix.jobs import Matrix
from tools.checkpoint_convert.__main__ import main

OLD = Path(__file__).parents[1] / "fixtures/export_0"
OLD_ARCHITECTURE = "gemma2_siglip_anyres"
BEFORE, AFTER = releases.CHANGES["the cache is called cache"]
RELEASES = releases.releases()
needs_both_sides = pytest.mark.skipif(AFTER not in RELEASES, reason=releases.NO_PYTHON)
# What the code of release 0 could not do under any transformers.
OLD_FAULTS = {"forward_with_the_cache", "prompt_lookup", "second_turn_with_all_images"}
# What works without a cache, and with weights and processor alone.
NO_CACHE = {"processor", "prompt_alone", "prompt_batched", "uncached", "causal_lm", "saved_again"}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """Reports of all exports by release; all processes are started when the first is asked for."""
    folder = tmp_path_factory.mktemp("matrix")
    exports = [make_export(folder, name, OLD / "tokenizer.model") for name in ARCHITECTURES]
    old = old_export(folder)
    refreshed = twin(old, "refreshed")
    assert main(["refresh", str(refreshed)]) == 0
    plan = {release: list(exports) for release in RELEASES}
    plan[RELEASES[-1]].append(refreshed)
    if AFTER in RELEASES:
        plan[BEFORE].append(old)
        plan[AFTER] += [old, *(without_the_fix(export) for export in exports)]
        plan[AFTER] += [refreshed] * (RELEASES[-1] != AFTER)
    reports = Matrix(folder / "runs", plan)
    yield reports
    reports.close()


def twin(export: Path, suffix: str) -> Path:
    """A copy of an export, which the same trainer's answers go with."""
    copy = export.with_name(f"{export.name}_{suffix}")
    shutil.copytree(export, copy)
    copy.with_name(f"{copy.name}.trainer").symlink_to(f"{export.name}.trainer")
    return copy


def old_export(folder: Path) -> Path:
    """An export as the code of release 0 made it, with weights that the trainer has answers for."""
    new = folder / OLD_ARCHITECTURE
    old = folder / "export_0"
    shutil.copytree(OLD, old, ignore=shutil.ignore_patterns("README.md", "tokenizer.model"))
    for file in new.glob("*.safetensors*"):
        shutil.copy2(file, old)
    (folder / "export_0.trainer").symlink_to(f"{OLD_ARCHITECTURE}.trainer")
    return old


def without_the_fix(export: Path) -> Path:
    """A copy whose `forward` drops the cache under the name that generation gives it today."""
    copy = twin(export, "without_the_fix")
    with (copy / "modeling_dattn.py").open("a", encoding="utf-8") as file:
        file.write(WITHOUT_THE_FIX)
    return copy


# As release 0 did: what it does not know goes into **kwargs, and nobody looks there.
WITHOUT_THE_FIX = """
import functools

_whole_forward = DattnForConditionalGeneration.forward


@functools.wraps(_whole_forward)  # generation looks at its signature
def _forgetful_forward(self, *args, cache=None, **kwargs):
    return _whole_forward(self, *args, **kwargs)


DattnForConditionalGeneration.forward = _forgetful_forward
"""


def report(matrix: Matrix, release: str, export: str) -> dict:
    try:
        return matrix.report(release, export)
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("export", ARCHITECTURES)
@pytest.mark.parametrize("release", RELEASES)
def test_export_says_what_the_trainer_says(matrix, release, export):
    found = report(matrix, release, export)
    assert found["failed"] == {}
    assert found["passed"] == CHECKS


def test_the_matrix_spans_what_exports_record():
    """The tested range of `config.json` is what is tested here, and both sides of each change."""
    oldest, newest = map(Version, TESTED_TRANSFORMERS)
    tested = [Version(release) for release in RELEASES if release != releases.NEWEST]
    assert Version(releases.INSTALLED) in tested
    assert tested[0] == oldest
    if AFTER not in RELEASES:
        pytest.skip(releases.NO_PYTHON)
    assert newest in tested
    for pair in releases.CHANGES.values():
        assert {Version(release) for release in pair} <= set(tested)


@needs_both_sides
@pytest.mark.parametrize("export", ARCHITECTURES)
def test_an_export_without_the_fix_fails(matrix, export):
    """The checks see a cache that is dropped, and see that all else is as it should be."""
    found = report(matrix, AFTER, f"{export}_without_the_fix")
    seen = {"cached", "alone", "text_only", "second_turn_with_the_cache"}
    assert seen <= set(found["failed"]), found
    assert set(found["passed"]) >= NO_CACHE, found


@needs_both_sides
def test_old_export_fails_where_the_cache_has_another_name(matrix):
    """That is: release 0's own code, which is right up to the release before."""
    before, after = (report(matrix, release, "export_0") for release in (BEFORE, AFTER))
    # Prompt lookup fails only where what was generated sends it to the image's place.
    assert OLD_FAULTS - {"prompt_lookup"} <= set(before["failed"]) <= OLD_FAULTS, before
    assert {"cached", "alone", "text_only"} <= set(after["failed"]), after
    assert set(after["passed"]) >= NO_CACHE, after


@needs_both_sides
@pytest.mark.parametrize("release", sorted({AFTER, RELEASES[-1]}))
def test_old_export_answers_again_once_refreshed(matrix, release):
    """As the trainer does, which is as its old code did under the release before."""
    assert "cached" in report(matrix, BEFORE, "export_0")["passed"]
    found = report(matrix, release, "export_0_refreshed")
    assert found["failed"] == {}
    assert found["passed"] == CHECKS


def test_fixture_is_the_old_code():
    """All files of its remote code; its `forward` swallows what it does not know."""
    assert len(list(OLD.glob("*_dattn.py"))) == 8
    assert "not used" in (OLD / "modeling_dattn.py").read_text(encoding="utf-8")
