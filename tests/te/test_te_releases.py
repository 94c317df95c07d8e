"""Which releases of Transformer Engine are tested, and how they are had."""

import pytest
from packaging.requirements import Requirement

from tests.installed import Unavailable
from tests.te import releases


def test_the_bounds_of_the_project_are_tested(monkeypatch):
    allowed = Requirement(releases.requirement()).specifier
    assert all(release in allowed for release in releases.TESTED)
    (lower,) = [part.version for part in allowed if part.operator == ">="]
    assert releases.TESTED[0] in (lower, f"{lower}.0")
    monkeypatch.delenv(releases.NEWEST_VARIABLE, raising=False)
    assert releases.releases() == list(releases.TESTED)
    monkeypatch.setenv(releases.NEWEST_VARIABLE, "1")
    assert releases.releases() == [*releases.TESTED, releases.NEWEST]


def test_without_an_index_a_release_is_unavailable(tmp_path, monkeypatch):
    monkeypatch.setenv(releases.FOLDER_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert not releases.is_here("2.8.99")
    with pytest.raises(Unavailable, match="cannot be installed from the index"):
        releases.folder_of("2.8.99")
    assert not releases.is_here("2.8.99")
