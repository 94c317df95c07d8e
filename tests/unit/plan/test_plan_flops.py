"""The planner's operations against PyTorch's own FLOP counter, on a whole training step."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dattn_mcore.config.load import from_dict, merge
from dattn_mcore.layers.layout import build_seq_params
from dattn_mcore.models.dattn import ModelInputs
from dattn_mcore.parallel.groups import single_process
from dattn_mcore.plan.flops import step_work
from dattn_mcore.plan.rows import Rows, causal_pairs, rows_of
from dattn_mcore.training.model import build_from_config
from tests.distributed.small_models import AIMV2, CLIP, GEMMA, SMALL_MODEL

LAYOUTS = [((True, 32), (False, 40)), ((True, 16), (False, 8), (True, 16), (False, 32))]
TOWER_TOO = ["vision", "projector", "llm"]


@pytest.fixture(scope="module")
def groups():
    with single_process() as pg_collection:
        yield pg_collection


def counted(config, groups):
    """Operations of a forward and backward pass, by PyTorch."""
    (model,) = build_from_config(config, groups, torch.device("cpu"))
    params = build_seq_params(LAYOUTS, t2v_position=config.attention.t2v_position, multiple=8)
    text = sum(rows for layout in LAYOUTS for visual, rows in layout if not visual)
    inputs = ModelInputs(
        params=params,
        text_ids=torch.randint(0, 300, (text,)),
        labels=torch.randint(0, 300, (text,)),
        tiles=torch.randint(0, 255, (params.num_visual // 16, 3, 56, 56), dtype=torch.uint8),
    )
    counter = FlopCounterMode(display=False)
    with counter:
        model(inputs).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("model", "attention", "trains"),
    [
        ({}, {}, TOWER_TOO),
        ({}, {}, ["projector", "llm"]),
        ({}, {}, ["projector"]),
        (merge(GEMMA, CLIP), {}, ["projector", "llm"]),
        (AIMV2, {}, TOWER_TOO),
        ({}, {"v2v": "causal", "t2v_position": "rope"}, TOWER_TOO),
    ],
    ids=["all", "frozen-tower", "projector", "gemma-clip", "aimv2", "baseline"],
)
def test_operations_are_within_two_percent_of_the_counter(groups, model, attention, trains):
    """The reference attention computes every pair within a sample and masks; so these count."""
    config = from_dict(
        {
            "model": merge(SMALL_MODEL, model),
            "attention": {**attention, "backend": "reference"},
            "train": {"trains": trains},
        }
    )
    text = sum(rows for layout in LAYOUTS for visual, rows in layout if not visual)
    rows = rows_of(config, LAYOUTS, labelled=text)
    dense = {"text": 0, "visual": 0}
    for layout in LAYOUTS:
        everything = sum(count for _, count in layout)
        for visual, count in layout:
            dense["visual" if visual else "text"] += count * everything
    dense = dict(text_pairs=dense["text"], windowed_text_pairs=dense["text"]) | (
        dict(visual_pairs=dense["visual"], windowed_visual_pairs=dense["visual"])
        if attention
        else {}
    )
    rows = Rows(**{**rows.__dict__, **dense})
    work = step_work(config, rows)
    # Model FLOPs leave out what is computed without need: the loss' logits a second time, and
    # gradients of frozen features. The reference attention finds no scores a second time.
    planned = sum(part.total for part in work.values())
    planned += work["head"].again + work["projector"].again
    assert planned == pytest.approx(counted(config, groups), rel=0.02)


def test_pairs_of_interleaved_images():
    """Text sees the visual rows before it, and earlier text; brute force over a small sample."""
    layout = ((False, 3), (True, 4), (False, 2), (True, 4), (False, 5))
    config = from_dict({"model": merge(SMALL_MODEL, {"vision": {"image_size": 28}})})
    order = [visual for visual, rows in layout for _ in range(rows)]
    pairs = sum(
        1 for i, asks in enumerate(order) if not asks for j in range(i + 1) if order[j] or j <= i
    )
    rows = rows_of(config, [layout], labelled=0)
    assert (rows.text, rows.visual, rows.tiles) == (10, 8, 2)
    assert rows.text_pairs == pairs
    baseline = from_dict(
        {
            "model": merge(SMALL_MODEL, {"vision": {"image_size": 28}}),
            "attention": {"v2v": "causal", "t2v_position": "rope"},
        }
    )
    rows = rows_of(baseline, [layout], labelled=0)
    assert rows.text_pairs + rows.visual_pairs == len(order) * (len(order) + 1) / 2


@pytest.mark.parametrize(("rows", "window"), [(1, 1), (5, 3), (7, 7), (9, 20), (12, 1)])
def test_pairs_within_a_window(rows, window):
    brute = sum(min(i + 1, window) for i in range(rows))
    assert causal_pairs(rows, window) == brute
