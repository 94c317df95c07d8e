"""What the tests of commands share."""

import pytest


@pytest.fixture
def workspace(digits, tmp_path):
    """A folder whose data/digits is the prepared data set."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/digits").symlink_to(digits)
    return tmp_path
