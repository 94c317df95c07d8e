"""Rules for context parallelism: one line each."""

from dataclasses import replace

import pytest

from dattn_mcore.config.checks import check_config, row_multiple
from dattn_mcore.config.context_rules import local_rows, tiles
from dattn_mcore.config.load import from_dict
from dattn_mcore.errors import ConfigError

ROWS = 16  # of a tile of the embedded model


def config_of(cp, *, v2v="diagonal", visual_budget=8 * ROWS):
    return from_dict(
        {
            "parallel": {"cp": cp},
            "attention": {"v2v": v2v},
            "model": {"vision": {"image_size": 56, "patch_size": 14}},
            "data": {"visual_budget": visual_budget},
        }
    )


def test_a_mode_without_local_rows_is_refused():
    (line,) = local_rows(config_of(2, v2v="causal"))
    assert "parallel.cp=2 needs attention.v2v=diagonal" in line
    assert "got attention.v2v=causal; use parallel.cp=1" in line


def test_a_budget_smaller_than_a_tile_a_rank_is_refused():
    (line,) = tiles(config_of(4, visual_budget=3 * ROWS + 15))
    assert line == (
        "data.visual_budget=63 holds 3 of 16 rows a tile, so ranks of parallel.cp=4 would have no "
        "tile in any micro-batch; set it to 64 at least, or use parallel.cp=3"
    )


@pytest.mark.parametrize("cp", [2, 8])
def test_one_line_where_the_whole_configuration_is_checked(cp):
    """Among the other rules: each breach is said once."""
    with pytest.raises(ConfigError) as caught:
        check_config(config_of(cp, v2v="causal", visual_budget=ROWS))
    lines = [line for line in caught.value.mistakes if "tile" in line or "v2v=diagonal" in line]
    assert len(lines) == 2 and len(set(lines)) == 2


def test_what_keeps_the_rules_is_let_through():
    for config in (
        config_of(4, visual_budget=4 * ROWS),
        config_of(1, v2v="causal", visual_budget=ROWS),
    ):
        assert not [*local_rows(config), *tiles(config)]


def tower_by_tiles(tp, cp, *, heads=2, visual_budget):
    return from_dict(
        {
            "parallel": {"tp": tp, "cp": cp, "tower": "tiles"},
            "model": {"vision": {"image_size": 56, "patch_size": 14, "num_attention_heads": heads}},
            "data": {"visual_budget": visual_budget},
        }
    )


def test_a_tower_by_tiles_needs_a_tile_for_each_tensor_rank_as_well():
    (line,) = tiles(tower_by_tiles(2, 2, visual_budget=3 * ROWS))
    assert line == (
        "data.visual_budget=48 holds 3 of 16 rows a tile, so some of the tp (2) x cp (2) ranks "
        "would have no tile in any micro-batch; set it to 64 at least, or use parallel.tower=tensor"
    )
    assert not [*tiles(tower_by_tiles(2, 2, visual_budget=4 * ROWS))]
    (line,) = tiles(tower_by_tiles(1, 4, visual_budget=3 * ROWS))
    assert "use parallel.cp=3" in line


def test_a_tower_by_tiles_may_have_fewer_heads_than_tensor_ranks():
    config = tower_by_tiles(4, 1, heads=2, visual_budget=4 * ROWS)
    check_config(config)
    with pytest.raises(ConfigError, match=r"model.vision.num_attention_heads=2 must be a multiple"):
        check_config(replace(config, parallel=replace(config.parallel, tower="tensor")))


def test_rows_divide_over_tensor_ranks_that_receive_them():
    config = tower_by_tiles(4, 3, visual_budget=12 * ROWS)
    config = replace(config, data=replace(config.data, pad_multiple=1))
    assert row_multiple(config) == 12
    assert row_multiple(replace(config, parallel=replace(config.parallel, tower="tensor"))) == 3
