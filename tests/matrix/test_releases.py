"""How releases of transformers get into folders of their own."""

import pytest
from packaging.version import Version

from tests.installed import Unavailable, unmet
from tests.matrix import releases
from tests.matrix.releases import INSTALLED, NEWEST, folder_of


def package(folder, name, version, *requirements):
    """What pip leaves of an installed package."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [f"Requires-Dist: {requirement}" for requirement in requirements]
    head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join([*head, *lines, ""]))


def test_what_a_folder_lacks(tmp_path):
    """Its own packages come before this environment's; extras and other systems do not count."""
    package(
        tmp_path,
        "transformers",
        "5.6.0",
        "numpy>=1.17",  # this environment has it
        "torch<1",
        "huggingface-hub<2",  # the folder has it
        "nowhere>=2",
        "pywin32; sys_platform == 'win32'",
        "jax; extra == 'flax'",
    )
    package(tmp_path, "huggingface_hub", "1.33.0", "anyio_of_before==1")
    assert unmet(tmp_path) == ["anyio_of_before==1", "nowhere>=2", "torch<1"]


def test_without_an_index_a_release_is_unavailable(tmp_path, monkeypatch):
    monkeypatch.setenv(releases.FOLDER_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        Unavailable, match="transformers==5.6.99 cannot be installed from the index"
    ):
        folder_of("5.6.99")
    assert not list((tmp_path / "cache").iterdir())
    assert folder_of(INSTALLED) is None


def test_releases_in_order(monkeypatch):
    """The newest of the index comes last, and only where it is asked for."""
    monkeypatch.setenv(releases.NEWEST_VARIABLE, "1")
    *before, last = releases.releases()
    assert last == NEWEST and INSTALLED in before
    assert before == sorted(before, key=Version)
    monkeypatch.delenv(releases.NEWEST_VARIABLE)
    assert releases.releases() == before


def test_a_process_has_one_release(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("HF_MODULES_CACHE", "/elsewhere")
    environment = releases.environment_of(tmp_path / "5.6.0", tmp_path)
    assert environment["PYTHONPATH"] == str(tmp_path / "5.6.0")
    assert environment["HF_HUB_OFFLINE"] == "1" and "HF_MODULES_CACHE" not in environment
    assert "PYTHONPATH" not in releases.environment_of(None, tmp_path)
