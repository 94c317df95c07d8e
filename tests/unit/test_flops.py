"""The closed form against PyTorch's FLOP counter on real runs of small models."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.count_flops import FLASH, counted_decoder_step
from dattn_mcore.config.load import from_dict, merge
from dattn_mcore.flops import (
    Pack,
    decoder_flops,
    head_flops,
    layer_pairs,
    projector_flops,
    step_flops,
    vision_flops,
)
from dattn_mcore.layers.vocabulary import chunked_cross_entropy
from dattn_mcore.models.build import build_model
from dattn_mcore.parallel import single_process
from tests.distributed.jobs import SMALL_MODEL

PACK = Pack((((True, 64), (False, 32)),), supervised=10)
PLAIN = {"fold_visual_projection": False, "skip_last_visual_rows": False}
BASELINE = {"v2v": "causal", "t2v_position": "rope"}
SETTINGS = {
    "dattn": {},
    "plain": {"attention": PLAIN},
    "rotated": {"attention": {"t2v_position": "rope"}},
    "baseline": {"attention": BASELINE},
    "baseline-plain": {"attention": {**BASELINE, **PLAIN}},
    "full": {"train": {"recompute": "full"}},
    "selective": {"train": {"recompute": "selective"}},
    "chunks-plain": {"attention": PLAIN, "train": {"recompute_visual_chunk": 64}},
    "chunks": {"train": {"recompute_visual_chunk": 24}},
    "chunks-full": {"train": {"recompute_visual_chunk": 24, "recompute": "full"}},
    "frozen": {"train": {"trains": ["projector"]}},
}


@pytest.fixture(scope="module")
def groups():
    with single_process() as collection:
        yield collection


def config_of(sections):
    return from_dict(merge({"model": SMALL_MODEL}, sections))


@pytest.mark.parametrize("name", SETTINGS)
def test_decoder_as_counted(groups, name):
    """Exact: the same products, with nothing left over."""
    config = config_of(SETTINGS[name])
    (model,) = build_model(config, groups, torch.device("cpu"))
    counted = counted_decoder_step(model, config, PACK, "cpu")
    assert counted == decoder_flops(config, PACK).total


def test_folding_and_ending_early_save_what_they_should():
    costs = [
        decoder_flops(config_of({"attention": attention}), PACK).forward
        for attention in (PLAIN, {"skip_last_visual_rows": False}, {})
    ]
    hidden, heads, groups, dim, ffn, layers = 64, 4, 2, 16, 96, 4
    assert costs[0] - costs[1] == layers * 64 * 2 * hidden * (heads - groups) * dim
    assert costs[1] - costs[2] == 64 * (2 * hidden * groups * dim + 6 * hidden * ffn)


@pytest.mark.parametrize("trains", ["vision", "projector", "llm"])
def test_tower_and_projector_as_counted(groups, trains):
    config = config_of({"train": {"trains": [trains]}})
    (model,) = build_model(config, groups, torch.device("cpu"))
    tiles = torch.zeros(4, 3, 56, 56, dtype=torch.uint8)
    with FlopCounterMode(display=False, custom_mapping=FLASH) as counter:
        rows = model._visual_rows(tiles, torch.float32)
        if rows.requires_grad:
            rows.sum().backward()
    with FlopCounterMode(display=False) as positions:
        grids = [model.projector.row_position(4), model.projector.column_position(4)]
        if trains == "projector":
            sum(grid.sum() for grid in grids).backward()
    counted = counter.get_total_flops() - positions.get_total_flops()
    closed = vision_flops(config, PACK).total + projector_flops(config, PACK).total
    assert counted == pytest.approx(closed, rel=0.03)


def test_head_as_counted(groups):
    config = config_of({})
    weight = torch.randn(config.model.llm.padded_vocab_size, 64, requires_grad=True)
    rows = torch.randn(PACK.supervised, 64, requires_grad=True)
    labels = torch.zeros(PACK.supervised, dtype=torch.int64)
    settings = dict(chunk=4, softcap=None, vocab_size=320, tp_group=groups.tp)
    with FlopCounterMode(display=False) as counter:
        chunked_cross_entropy(rows, weight, labels, **settings).sum().backward()
    assert counter.get_total_flops() == head_flops(config, PACK).total


def test_pairs_one_by_one():
    """Against a count of every pair, interleaved images and windows included."""
    layouts = (((False, 3), (True, 5), (False, 4), (True, 2), (False, 2)), ((False, 6),))
    pack = Pack(layouts, 1)
    rows = [
        [is_visual for is_visual, n in layout for _ in range(n)] for layout in layouts
    ]  # reading order
    assert pack.pairs("t2v") == sum(
        kinds[k] and not kinds[q] for kinds in rows for q in range(len(kinds)) for k in range(q)
    )
    for kind, wanted in (("t2t", (False,)), ("v2v", (True,)), ("all", (True, False))):
        for window in (None, 1, 4):
            expected = 0
            for kinds in rows:
                length = sum(kind_of in wanted for kind_of in kinds)
                expected += sum(
                    q - k < (window or length) for q in range(length) for k in range(q + 1)
                )
            assert pack.pairs(kind, window) == expected, (kind, window)


def test_windows_alternate():
    config = config_of({"model": {"llm": {"sliding_window": 8, "sliding_window_every": 2}}})
    assert layer_pairs(config, PACK, 0) < layer_pairs(config, PACK, 1)
    assert layer_pairs(config, PACK, 1) == 32 * 64 + 32 * 33 // 2


def test_a_step_is_the_sum_of_its_packs():
    config = config_of({})
    one, two = step_flops(config, [PACK]), step_flops(config, [PACK, PACK])
    assert {name: 2 * part.total for name, part in one.items()} == {
        name: part.total for name, part in two.items()
    }
    assert one["decoder"].total > one["head"].total > 0
    more = dataclasses.replace(PACK, supervised=20)
    assert head_flops(config, more).total == 2 * head_flops(config, PACK).total
