"""The closed form against PyTorch's FLOP counter on real runs of small models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.count_flops import FLASH, counted_decoder_step
from dattn_mcore.config.load import from_dict, merge
from dattn_mcore.layers.vocabulary import chunked_cross_entropy
from dattn_mcore.parallel.groups import single_process
from dattn_mcore.plan.flops import decoder_work, layer_pairs, step_work
from dattn_mcore.plan.rows import rows_of
from dattn_mcore.training.model import build_from_config
from dattn_mcore.types import NO_IMAGES
from tests.distributed.small_models import AIMV2, SMALL_MODEL

LAYOUTS = (((True, 64), (False, 32)),)
LABELLED = 10
PLAIN = {"fold_visual_projection": False, "skip_last_visual_rows": False}
BASELINE = {"v2v": "causal", "t2v_position": "rope"}
BOTH = ["core_attn", "mlp"]
SETTINGS = {
    "dattn": {},
    "plain": {"attention": PLAIN},
    "rotated": {"attention": {"t2v_position": "rope"}},
    "baseline": {"attention": BASELINE},
    "baseline-plain": {"attention": {**BASELINE, **PLAIN}},
    "full": {"train": {"recompute": "full"}},
    "full-some": {"train": {"recompute": "full", "recompute_layers": 3}},
    "selective": {"train": {"recompute": "selective"}},
    "selective-mlp": {"train": {"recompute": "selective", "recompute_modules": ["mlp"]}},
    "selective-both": {"train": {"recompute": "selective", "recompute_modules": BOTH}},
    "chunks-plain": {"attention": PLAIN, "train": {"recompute_visual_chunk": 64}},
    "chunks": {"train": {"recompute_visual_chunk": 24}},
    "chunks-full": {"train": {"recompute_visual_chunk": 24, "recompute": "full"}},
    "chunks-mlp": {
        "train": {
            "recompute_visual_chunk": 24,
            "recompute": "selective",
            "recompute_modules": ["mlp"],
        }
    },
    "frozen": {"train": {"trains": ["projector"]}},
}


@pytest.fixture(scope="module")
def groups():
    with single_process() as collection:
        yield collection


def config_of(sections):
    return from_dict(merge({"model": SMALL_MODEL}, sections))


def work_of(config, labelled=LABELLED):
    return step_work(config, rows_of(config, LAYOUTS, labelled))


UPPER = {"optim": {"groups": [{"patterns": "decoder.layers.{2..3}", "trains": True}]}}
# Without anything that learns below: backward ends at the first layer that does.
ABOVE = {
    "upper-layers": {},
    "one-linear": {"patterns": "decoder.layers.2.mlp.linear_fc2"},
    "one-attention": {"patterns": "decoder.layers.1.self_attention"},
    "between": {"patterns": "decoder.layers.{0,2}.self_attention.linear_kv"},
    "a-norm": {"patterns": "decoder.layers.2.pre_mlp_layernorm"},
}


@pytest.mark.parametrize("name", ABOVE)
def test_nothing_is_computed_below_what_learns(groups, name):
    """Exact; a linear whose weight learns also gets the gradient of its input."""
    group = {"patterns": "decoder.layers.{2..3}"} | ABOVE[name] | {"trains": True}
    config = config_of({"train": {"trains": []}, "optim": {"groups": [group]}})
    (model,) = build_from_config(config, groups, torch.device("cpu"))
    counted = counted_decoder_step(model, config, LAYOUTS, "cpu", entered_learns=False)
    work = decoder_work(config, rows_of(config, LAYOUTS, LABELLED))
    assert counted == sum(part.executed for part in work.values())
    everything = work_of(config_of({"train": {"trains": ["llm"]}}))
    assert sum(part.total for part in work.values()) < 0.9 * sum(
        everything[part].total for part in work
    )


@pytest.mark.parametrize("recompute", ["full", "chunks"])
def test_what_is_computed_again_reaches_below_what_learns(groups, recompute):
    """Megatron-Core's checkpoint needs an input that learns; the model does not."""
    train = {"recompute": "full"} if recompute == "full" else {"recompute_visual_chunk": 24}
    config = config_of(merge(UPPER, {"train": {"trains": [], **train}}))
    (model,) = build_from_config(config, groups, torch.device("cpu"))
    counted = counted_decoder_step(model, config, LAYOUTS, "cpu")
    work = decoder_work(config, rows_of(config, LAYOUTS, LABELLED))
    assert counted == sum(part.executed for part in work.values())
    plain = decoder_work(
        config_of(merge(UPPER, {"train": {"trains": []}})), rows_of(config, LAYOUTS, LABELLED)
    )
    assert {name: part.total for name, part in work.items()} == {
        name: part.total for name, part in plain.items()
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_decoder_as_counted(groups, name):
    """Exact: the same products, with nothing left over."""
    config = config_of(SETTINGS[name])
    (model,) = build_from_config(config, groups, torch.device("cpu"))
    counted = counted_decoder_step(model, config, LAYOUTS, "cpu")
    work = decoder_work(config, rows_of(config, LAYOUTS, LABELLED))
    assert counted == sum(part.executed for part in work.values())


@pytest.mark.parametrize("name", ["dattn", "plain", "full", "chunks"])
def test_shared_rows_as_counted(groups, name):
    """Exact; of samples that show the same images, visual rows are computed once."""
    sample = ((True, 64), (False, 32))
    layouts, units = (sample, sample, ((False, 32),), sample, sample), (0, 1, NO_IMAGES, 1, 0)
    config = config_of(SETTINGS[name])
    (model,) = build_from_config(config, groups, torch.device("cpu"))
    counted = counted_decoder_step(model, config, layouts, "cpu", images_of=units)
    work = decoder_work(config, rows_of(config, layouts, LABELLED, units))
    assert counted == sum(part.executed for part in work.values())
    own = decoder_work(config, rows_of(config, layouts, LABELLED))
    assert work["visual"] == own["visual"] * 0.5
    assert (work["text"], work["attention"]) == (own["text"], own["attention"])


def test_folding_and_ending_early_save_what_they_should():
    costs = [
        sum(part.forward for part in work_of(config_of({"attention": attention})).values())
        for attention in (PLAIN, {"skip_last_visual_rows": False}, {})
    ]
    hidden, heads, groups, dim, ffn, layers = 64, 4, 2, 16, 96, 4
    assert costs[0] - costs[1] == layers * 64 * 2 * hidden * (heads - groups) * dim
    assert costs[1] - costs[2] == 64 * (2 * hidden * groups * dim + 6 * hidden * ffn)


@pytest.mark.parametrize("tower", [{}, AIMV2], ids=["siglip", "aimv2"])
@pytest.mark.parametrize("trains", ["vision", "projector", "llm"])
def test_tower_and_projector_as_counted(groups, trains, tower):
    config = config_of({"train": {"trains": [trains]}, "model": tower})
    (model,) = build_from_config(config, groups, torch.device("cpu"))
    tiles = torch.zeros(4, 3, 56, 56, dtype=torch.uint8)
    with FlopCounterMode(display=False, custom_mapping=FLASH) as counter:
        rows = model._visual_rows(tiles, torch.float32)
        if rows.requires_grad:
            rows.sum().backward()
    work = work_of(config)
    closed = work["tower"].executed + work["projector"].executed
    assert counter.get_total_flops() == pytest.approx(closed, rel=0.03)


TOWER_GROUPS = {
    "upper-half": {"patterns": "vision.layers.1"},
    "one-linear": {"patterns": "vision.layers.1.mlp.linear_fc1"},
    "first-layer": {"patterns": "vision.layers.0.self_attention"},
    "patches": {"patterns": "vision.patch_embedding"},
    "projectors-second": {"patterns": "projector.mlp.linear_fc2"},
}


@pytest.mark.parametrize("name", TOWER_GROUPS)
def test_a_tower_that_learns_in_part_as_counted(groups, name):
    """The tower's layers need no backward pass below the first that learns."""
    group = TOWER_GROUPS[name] | {"trains": True}
    config = config_of({"train": {"trains": []}, "optim": {"groups": [group]}})
    (model,) = build_from_config(config, groups, torch.device("cpu"))
    tiles = torch.zeros(4, 3, 56, 56, dtype=torch.uint8)
    with FlopCounterMode(display=False, custom_mapping=FLASH) as counter:
        rows = model._visual_rows(tiles, torch.float32)
        rows.sum().backward()
    work = work_of(config)
    closed = work["tower"].executed + work["projector"].executed
    assert counter.get_total_flops() == pytest.approx(closed, rel=0.01)
    whole = work_of(config_of({"train": {"trains": ["vision"]}}))
    assert work["tower"].total < whole["tower"].total


def test_head_as_counted(groups):
    config = config_of({})
    weight = torch.randn(config.model.llm.padded_vocab_size, 64, requires_grad=True)
    rows = torch.randn(LABELLED, 64, requires_grad=True)
    labels = torch.zeros(LABELLED, dtype=torch.int64)
    settings = dict(chunk=4, softcap=None, vocab_size=320, tp_group=groups.tp)
    with FlopCounterMode(display=False) as counter:
        chunked_cross_entropy(rows, weight, labels, **settings).sum().backward()
    assert counter.get_total_flops() == work_of(config)["head"].executed


INTERLEAVED = (((False, 3), (True, 5), (False, 4), (True, 2), (False, 2)), ((False, 6),))


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("position", ["none", "rope"])
@pytest.mark.parametrize("v2v", ["diagonal", "causal"])
def test_pairs_one_by_one(v2v, position, window):
    """Against a look at every pair: kinds of rows, reading order, and who shares an axis."""
    attention = {"v2v": v2v, "t2v_position": position}
    llm = {"sliding_window": window}
    config = config_of({"model": {"llm": llm}, "attention": attention})
    expected = {(asks, cut): 0 for asks in (False, True) for cut in (False, True)}
    for layout in INTERLEAVED:
        kinds = [is_visual for is_visual, n in layout for _ in range(n)]
        for q, asks in enumerate(kinds):
            for k in range(q + 1):
                if asks and v2v == "diagonal":
                    continue
                if asks and not kinds[k] and position == "none":
                    continue  # visual rows see text on a common axis only
                distance, cut = q - k, True
                if position == "none":
                    distance = sum(kind == asks for kind in kinds[k:q])
                    cut = kinds[k] == asks
                expected[asks, False] += 1
                expected[asks, True] += not (cut and window) or distance < window
    rows = rows_of(config, INTERLEAVED, 1)
    assert (rows.text_pairs, rows.windowed_text_pairs) == (
        expected[False, False],
        expected[False, True],
    )
    assert (rows.visual_pairs, rows.windowed_visual_pairs) == (
        expected[True, False],
        expected[True, True],
    )


def test_windows_alternate():
    config = config_of(
        {"model": {"llm": {"sliding_window": 8, "layer_pattern": ["sliding", "full"]}}}
    )
    rows = rows_of(config, LAYOUTS, LABELLED)
    assert layer_pairs(config, rows, 0) < layer_pairs(config, rows, 1)
    assert layer_pairs(config, rows, 1) == 32 * 64 + 32 * 33 // 2


def test_a_step_is_the_sum_of_its_packs():
    config = config_of({})
    rows = rows_of(config, LAYOUTS, LABELLED)
    one, two = step_work(config, rows), step_work(config, rows + rows)
    assert {name: part * 2 for name, part in one.items()} == two
    assert sum(one[name].total for name in ("text", "visual")) > one["head"].total > 0
    assert work_of(config, 2 * LABELLED)["head"] == one["head"] * 2
