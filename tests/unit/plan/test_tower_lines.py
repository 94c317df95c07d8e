"""What the dry run says of the tower over tensor parallel ranks."""

import dataclasses
import re

from dattn_mcore.config.load import from_dict
from dattn_mcore.plan.rows import rows_of
from dattn_mcore.plan.tower_lines import tower_lines
from dattn_mcore.plan.tower_work import tower_cost


def config_of(tp, tiles, **train):
    vision = {"image_size": 56, "patch_size": 14, "num_layers": 4}
    return from_dict(
        {
            "model": {"vision": vision},
            "parallel": {"tp": tp},
            "data": {"visual_budget": 16 * tiles, "text_budget": 512},
            "train": train,
        }
    )


def test_both_ways_and_the_better_one():
    config = config_of(2, 8, trains=["llm"])
    (line,) = tower_lines(config, 1)
    pack = rows_of(config, [((True, 8 * 16), (False, 1))], 1)
    tensor, tiles = (tower_cost(config, pack, work) for work in ("tensor", "tiles"))
    assert line.startswith(
        f"vision tower of a full micro-batch (8 tiles) on a rank: parallel.tower=tensor "
        f"{tensor.operations:.3g} operations and {tensor.bytes / 2**20:.3g} MiB sent, tiles "
        f"{tiles.operations:.3g} and {tiles.bytes / 2**20:.3g} MiB"
    )
    assert line.endswith("tiles is less in all")


def test_a_budget_of_fewer_tiles_than_ranks_leaves_one_way():
    (line,) = tower_lines(config_of(4, 3), 1)
    assert line.endswith("tiles cannot be, with fewer tiles than ranks")


def test_a_step_of_few_micro_batches_says_what_its_gradients_cost():
    config = config_of(2, 8, trains=["vision", "projector", "llm"], global_batch_size=2)
    (line,) = tower_lines(config, 2)
    sent = re.search(r"and ([\d.]+) MiB of gradients a step of 1 micro-batches", line)
    assert sent and float(sent[1]) > 0


def test_nothing_where_there_is_no_choice():
    assert tower_lines(config_of(1, 8), 1) == []
    small = config_of(2, 8)
    data = dataclasses.replace(small.data, visual_budget=15)
    assert tower_lines(dataclasses.replace(small, data=data), 1) == []
