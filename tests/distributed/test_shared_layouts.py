"""Shared images in every layout: each gradient is that of one process whose samples share none.

Both models compute in float64; the one process keeps every row to the end and attends by the
reference backend. A tensor that is divided over ranks is compared piece by piece.
"""

import functools

import pytest
import torch

from dattn_mcore.config.load import merge
from tests.distributed.gradient_jobs import spans
from tests.distributed.shared_layout_jobs import gradients_of_data
from tests.distributed.small_models import small_config
from tests.distributed.test_shared_images import PLAIN

LAYOUTS = {
    "tp2-sp": {"tp": 2, "sp": True},
    "pp2": {"pp": 2},
    "dp2": {},
}
PASSES = {
    "once": {},
    "recomputed": {"recompute": "full"},
    "chunks": {"recompute_visual_chunk": 24},
}
IMAGES = {
    "tiles": {"visual_budget": 256},
    "canvas": {"image_policy": "anyres_stretch", "visual_budget": 1200},
}
# Layout, merge, pass and images, in pairs.
CASES = [
    ("tp2-sp", "alpha", "chunks", "tiles"),
    ("tp2-sp", "sum", "recomputed", "canvas"),
    ("tp2-sp", "alpha", "once", "canvas"),
    ("pp2", "sum", "chunks", "canvas"),
    ("pp2", "alpha", "recomputed", "tiles"),
    ("pp2", "sum", "once", "tiles"),
    ("dp2", "alpha", "chunks", "canvas"),
    ("dp2", "sum", "recomputed", "tiles"),
    ("dp2", "alpha", "once", "tiles"),
]


def tree_of(questions, run_dir, merge_by, images, sections):
    data = {"text_budget": 256, **IMAGES[images]}
    own = {"data": data, "attention": {"merge": merge_by}}
    return small_config(questions, run_dir, **merge(own, sections))


@pytest.fixture(scope="module")
def apart(pool, questions, tmp_path_factory):
    """Whole gradients by key, loss and visual rows of one process, each sample with its images."""

    @functools.cache
    def run(merge_by, images):
        run_dir = tmp_path_factory.mktemp("apart")
        sections = {"data": {"share_images": False}, "attention": PLAIN}
        tree = tree_of(questions, run_dir, merge_by, images, sections)
        ((pieces, loss, rows),) = pool.run(gradients_of_data, 1, tree)
        whole = {}
        for key, shape, offset, piece in pieces:
            tensor = whole.setdefault(key, torch.full(shape, torch.nan))
            place = spans(offset, piece.shape)
            tensor[place] = piece.view_as(tensor[place])
        assert not any(tensor.isnan().any() for tensor in whole.values())
        return whole, loss, rows

    return run


@pytest.mark.parametrize(
    ("layout", "merge_by", "how", "images"), CASES, ids=lambda value: str(value)
)
def test_each_gradient_is_that_of_one_process_without_sharing(
    pool, questions, apart, tmp_path, layout, merge_by, how, images
):
    sections = {"parallel": LAYOUTS[layout], "train": PASSES[how]}
    tree = tree_of(questions, tmp_path, merge_by, images, sections)
    results = pool.run(gradients_of_data, 2, tree)
    whole, loss, rows = apart(merge_by, images)
    covered = {key: torch.zeros(tensor.shape, dtype=torch.bool) for key, tensor in whole.items()}
    for pieces, of_rank, computed in results:
        assert of_rank == pytest.approx(loss, rel=1e-6)
        assert computed < 0.9 * rows
        for key, shape, offset, piece in pieces:
            assert shape == tuple(whole[key].shape), key
            place = spans(offset, piece.shape)
            # Of the tensor's largest: float32 in places, and in the sum over micro-batches.
            bound = float(1e-6 * whole[key].abs().max())
            assert bound > 0, key
            expected = whole[key][place]
            torch.testing.assert_close(
                piece.view_as(expected), expected, atol=bound, rtol=0, msg=f"{key} {offset}"
            )
            covered[key][place] = True
    assert all(seen.all() for seen in covered.values())
