"""Every layout gives the loss and the gradients of one process, on the same global batches.

Three optimizer steps: from the second on the losses also show that the *updates* agreed. Bounds
are those of the design: 1e-5 for the loss, relative 1e-4 for the gradient norm (fp32, sums in
another order).
"""

import functools

import pytest

from tests.distributed.jobs import GEMMA, read_metrics, run_training, small_config

LAYOUTS = {
    "tp2": (2, {"tp": 2}),
    "tp2-sp": (2, {"tp": 2, "sp": True}),
    "pp2": (2, {"pp": 2}),
    "pp2-interleaved": (2, {"pp": 2, "vpp": 2}),
    "dp2": (2, {}),
    "tp2-pp2-sp": (4, {"tp": 2, "pp": 2, "sp": True}),
    "tp2-pp2-dp2": (8, {"tp": 2, "pp": 2}),
}


@pytest.fixture(scope="module")
def losses_of(pool, digits, tmp_path_factory):
    """Trains a layout and returns its metrics; runs that several tests compare to run once."""

    @functools.cache
    def cached(world_size, key):
        sections = {section: dict(values) for section, values in key}
        run_dir = tmp_path_factory.mktemp("run")
        tree = small_config(digits, run_dir, **sections)
        if sections.get("model", {}).get("family") == "gemma2":
            tree = small_config(digits, run_dir, **{**sections, "model": GEMMA})
        assert all(pool.run(run_training, world_size, tree))
        return read_metrics(run_dir)

    def run(world_size, **sections):
        key = tuple(sorted((name, tuple(sorted(s.items()))) for name, s in sections.items()))
        return cached(world_size, key)

    return run


def assert_same(rows, expected):
    assert len(rows) == len(expected) == 3
    for row, want in zip(rows, expected, strict=True):
        assert row["supervised_tokens"] == want["supervised_tokens"]
        assert row["loss"] == pytest.approx(want["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
    # Otherwise the comparison says nothing: the model learns, and the gradients are not zero.
    assert expected[2]["loss"] < expected[0]["loss"] - 0.05
    assert all(row["grad_norm"] > 1e-2 for row in expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(losses_of, name):
    world_size, parallel = LAYOUTS[name]
    assert_same(losses_of(world_size, parallel=parallel), losses_of(1))


@pytest.mark.parametrize("name", ["tp2-sp", "pp2", "tp2-pp2-sp"])
def test_gemma_layout(losses_of, name):
    """Post-norms, soft-caps, windows, zero-centred gammas, embeddings tied across stages."""
    world_size, parallel = LAYOUTS[name]
    model = {"family": "gemma2"}
    assert_same(losses_of(world_size, parallel=parallel, model=model), losses_of(1, model=model))


@pytest.mark.parametrize(
    "mode",
    [
        {"v2v": "causal", "t2v_position": "rope"},
        {"merge": "sum"},
        {"v2v": "causal", "merge": "sum"},
    ],
    ids=lambda mode: "-".join(mode.values()),
)
def test_modes_under_sequence_parallelism(losses_of, mode):
    world_size, parallel = LAYOUTS["tp2-pp2-sp"]
    assert_same(
        losses_of(world_size, parallel=parallel, attention=mode), losses_of(1, attention=mode)
    )


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recompute(losses_of, recompute):
    rows = losses_of(2, parallel={"tp": 2, "sp": True}, train={"recompute": recompute})
    assert_same(rows, losses_of(1))


@pytest.mark.parametrize(
    "budgets",
    [
        {"text_budget": 64, "visual_budget": 32},  # many small packs
        {"text_budget": 4096, "visual_budget": 4096},  # one pack
        {"pad_multiple": 1},
    ],
    ids=["many-packs", "one-pack", "unpadded"],
)
def test_packing(losses_of, budgets):
    assert_same(losses_of(1, data=budgets), losses_of(1))


def test_frozen_llm_with_pipeline(losses_of):
    """Alignment: the last stage has nothing to train, but must pass gradients on."""
    train = {"trains": ("projector",)}
    assert_same(losses_of(2, parallel={"pp": 2}, train=train), losses_of(1, train=train))


def test_attention_backends_agree(losses_of):
    assert_same(losses_of(1, attention={"backend": "reference"}), losses_of(1))
