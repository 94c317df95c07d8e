"""The settings that docs/training.md shows can be pasted."""

import re
from pathlib import Path

import pytest

from dattn_mcore.config.checks import check_config
from dattn_mcore.config.load import load_config

ROOT = Path(__file__).parents[3]
BLOCKS = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/training.md").read_text(), re.M | re.S)


@pytest.mark.parametrize("block", BLOCKS)
def test_settings_break_no_rule(block, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(f"base: {ROOT / 'configs/gemma_it.yaml'}\n{block}")
    check_config(load_config(path))


def test_there_are_some():
    assert any("groups:" in block for block in BLOCKS)
