"""The trainer against plain PyTorch outside of Megatron-Core, a few steps of `benchmarks.same_curve`.

The same weights, samples and AdamW; the plain side has no packing and no code of the package.
"""

import pytest

from benchmarks import same_curve
from benchmarks.plain_training import perturbed
from dattn_mcore.config.load import merge
from tests.distributed.jobs import run_training

STEPS, BATCH = 5, 6
# Of models of 1,000,000 parameters; these are smaller, so that a step is fast.
SMALL = {
    "model": {
        "llm": {
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "num_layers": 2,
            "head_dim": 16,
        },
        "vision": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48},
        "projector": {"ffn_hidden_size": 64},
    },
    "data": {"text_budget": 64, "visual_budget": 32},  # two images a pack: three packs and more
    "train": {"global_batch_size": BATCH},
}


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    return same_curve.prepare_data(tmp_path_factory.mktemp("same") / "data", STEPS * BATCH)


@pytest.mark.parametrize("mode", same_curve.MODES)
def test_losses_are_those_of_plain_training(pool, captions, tmp_path, mode):
    start = same_curve.make_start(mode, captions, tmp_path, STEPS, SMALL)
    curves = {}
    for tp, pp in same_curve.LAYOUTS.values():
        run_dir = tmp_path / f"tp{tp}_pp{pp}"
        settings = {"parallel": {"tp": tp, "pp": pp}, "log": {"run_dir": str(run_dir)}}
        assert all(pool.run(run_training, tp * pp, merge(start.tree, settings)))
        curves[tp, pp] = same_curve.read_curve(run_dir)
    batches = same_curve.read_batches(tmp_path / "tp1_pp1", start.captions)
    plain = same_curve.plain_curve(mode, start, batches, start.weights)
    assert (
        plain.losses[0] - plain.losses[-1] > 0.1
    )  # it learns: equal losses that stay prove little
    for layout, curve in curves.items():
        # The bound of the benchmark. Five steps of float32 differ by about 1e-6, as a perturbed
        # rerun does; a wrong factor, decay or position by more than 1e-3.
        apart = same_curve.differences(curve.losses, plain.losses)
        assert max(apart) < same_curve.BOUND / 5, (layout, apart)
        apart = same_curve.differences(curve.norms, plain.norms)
        assert max(apart) < same_curve.BOUND, (layout, apart)
    other = same_curve.plain_curve(mode, start, batches, perturbed(start.weights, 1e-2, seed=1))
    assert max(same_curve.differences(other.losses, plain.losses)) > 10 * same_curve.BOUND
