"""Checkpoints that several tests read, forge or damage."""

import shutil
import tarfile
from pathlib import Path

import pytest

from tests.unit.checkpoint.runs import small_run
from tests.unit.convert.convert_helpers import make_tokenizer, small_config

OLD = Path(__file__).parents[2] / "fixtures/checkpoint_format_1.tar.xz"


@pytest.fixture(scope="session")
def small_configuration(tmp_path_factory):
    """Of the runs below."""
    return small_config(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def saved(small_configuration, tmp_path_factory):
    """Checkpoints of steps 1 and 2, never changed."""
    root = tmp_path_factory.mktemp("saved") / "run/checkpoints"
    with small_run(root, small_configuration) as run:
        for step in (1, 2):
            run.step(step)
            run.saver.save(step)
    return root


@pytest.fixture
def checkpoints(saved, tmp_path):
    """A copy of them to forge or damage."""
    return shutil.copytree(saved, tmp_path / "run/checkpoints")


@pytest.fixture
def old_checkpoint(tmp_path):
    """Step 2 of a run of the first release: byte entries, and a manifest without a digest."""
    root = tmp_path / "old/checkpoints"
    with tarfile.open(OLD) as archive:
        # Python's own releases since 2023 have filters, and later ones ask for one.
        options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(root, **options)
    return root / "step_00000002"
