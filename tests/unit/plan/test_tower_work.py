"""What each way to divide the vision tower costs; bytes of a run: `test_tower_tiles`."""

import dataclasses

import pytest

from dattn_mcore.config.load import from_dict
from dattn_mcore.models.tile_share import share_tiles
from dattn_mcore.plan.context import rows_dealt
from dattn_mcore.plan.flops import step_work
from dattn_mcore.plan.rows import rows_of
from dattn_mcore.plan.tower_work import cheaper, tower_cost


def config_of(tp, cp=1, **train):
    vision = {"image_size": 56, "patch_size": 14, "num_layers": 4}
    parallel = {"tp": tp, "cp": cp, "sp": tp > 1}
    return from_dict({"model": {"vision": vision}, "parallel": parallel, "train": train})


def pack_of(config, tiles):
    rows = config.model.vision.rows_per_tile
    return rows_of(config, [((True, tiles * rows), (False, 64))], 1)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(("tiles", "ranks"), [(8, 4), (7, 4), (6, 4), (5, 3), (3, 4), (1, 2)])
def test_moved_rows_are_those_of_the_exchange(tiles, ranks, back):
    side = 6
    per_tile = side * side
    assert tiles * per_tile % ranks == 0  # nothing is padded
    moved = []
    for rank in range(ranks):
        share = share_tiles(
            num_tiles=tiles,
            items=(),
            side=side,
            num_visual=tiles * per_tile,
            rank=rank,
            ranks=ranks,
        )
        moved.append(sum(share.send_counts) - share.send_counts[rank])
        if back:
            moved[-1] += sum(share.receive_counts) - share.receive_counts[rank]
    dealt = rows_dealt(tiles, per_tile, ranks)
    assert max(sent + back * got for sent, got in dealt) == max(moved)


def test_whole_tiles_cost_what_the_tensor_division_does_where_they_divide_evenly():
    config = config_of(2)
    pack = pack_of(config, 8)
    tensor, tiles = (tower_cost(config, pack, work) for work in ("tensor", "tiles"))
    work = step_work(config, pack_of(config, 4))
    assert tiles.operations == work["tower"].executed + work["projector"].executed
    assert tensor.operations == pytest.approx(tiles.operations)
    assert tiles.tiles == 4 and tensor.tiles == 8
    assert tiles.bytes < tensor.bytes / 10


def test_one_tile_of_few_ranks_makes_the_tensor_division_cheaper():
    config = config_of(4)
    pack = pack_of(config, 1)
    tensor, tiles = (tower_cost(config, pack, work) for work in ("tensor", "tiles"))
    assert 2 * tensor.operations < tiles.operations < 4 * tensor.operations
    assert cheaper(config, pack, 1) != "tiles"


def test_many_micro_batches_outweigh_the_gradients_of_a_step():
    config = config_of(2)
    pack = pack_of(config, 8)
    assert cheaper(config, pack, 1000) == "tiles"


def test_a_frozen_tower_sums_no_gradients():
    config = config_of(2, trains=["llm"])
    cost = tower_cost(config, pack_of(config, 8), "tiles")
    assert cost.bytes_per_step == 0
    learning = tower_cost(config_of(2), pack_of(config, 8), "tiles")
    assert learning.bytes_per_step > 0


def test_one_rank_has_no_choice():
    config = config_of(1)
    assert cheaper(config, pack_of(config, 4), 2) is None
    both = [tower_cost(config, pack_of(config, 4), work) for work in ("tensor", "tiles")]
    assert dataclasses.astuple(both[0]) == dataclasses.astuple(both[1])
    assert both[0].bytes == 0
