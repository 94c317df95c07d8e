"""Features of clusters change nothing but speed: the same losses, with and without them."""

import pytest

from dattn_mcore.config.checks import check_config
from dattn_mcore.config.load import load_config
from dattn_mcore.errors import ConfigError
from tests.distributed.jobs import (
    read_metrics,
    run_training,
    small_config,
    train_in_small_buckets,
    train_until_killed,
)

# The shipped run with pipeline stages, without what it overlaps and FP8.
STAGES = [
    *("parallel.pp=2", "train.fp8=none", "parallel.overlap_grad_reduce=false"),
    "parallel.overlap_param_gather=false",
]
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.fixture(scope="module")
def plain(pool, digits, tmp_path_factory):
    """Losses of one process without any feature."""
    run_dir = tmp_path_factory.mktemp("plain")
    pool.run(run_training, 1, small_config(digits, run_dir))
    return [row["loss"] for row in read_metrics(run_dir)]


# Another order of additions, in float32, over three steps.
@pytest.mark.parametrize(
    ("world_size", "sections"),
    [
        (2, {"parallel": OVERLAP}),
        (4, {"parallel": {"pp": 2, **OVERLAP}}),
        (4, {"parallel": {"pp": 2, "vpp": 2, **OVERLAP}}),
        (2, {"parallel": OVERLAP, "train": {"trains": ["projector", "llm"]}}),
        (2, {"parallel": {"tp": 2, "sp": True}, "data": {"fixed_rows": True}}),
        (2, {"parallel": {"pp": 2, "first_stage_layers": 1}}),
        (2, {"parallel": {"pp": 2}, "data": {"fixed_rows": True}}),
        (
            2,
            {
                "parallel": {"tp": 2, "sp": True},
                "train": {
                    "recompute": "selective",
                    "recompute_modules": ["mlp", "core_attn"],
                },
            },
        ),
        (1, {"parallel": {}, "train": {"recompute": "full", "recompute_layers": 3}}),
    ],
    ids=[
        *("overlap-dp2", "overlap-pp2-dp2", "overlap-vpp2-dp2", "overlap-frozen"),
        *("fixed-tp2", "uneven", "fixed-pp2", "recompute-modules", "recompute-layers"),
    ],
)
def test_losses_are_those_of_one_process(pool, digits, tmp_path, plain, world_size, sections):
    tree = small_config(digits, tmp_path, **sections)
    job = (
        train_in_small_buckets if sections["parallel"].get("overlap_grad_reduce") else run_training
    )
    expected = plain
    if "trains" in sections.get("train", {}):
        alone = small_config(digits, tmp_path / "alone", train=sections["train"])
        pool.run(run_training, 1, alone)
        expected = [row["loss"] for row in read_metrics(tmp_path / "alone")]
    pool.run(job, world_size, tree)
    losses = [row["loss"] for row in read_metrics(tmp_path)]
    assert losses == pytest.approx(expected, abs=1e-5)


def test_overlapped_weights_are_saved_whole(pool, digits, tmp_path, plain):
    """Stopped after step 2 and resumed in one process, which reads every rank's weights."""
    tree = small_config(digits, tmp_path, parallel=OVERLAP)
    assert pool.run(train_until_killed, 2, tree, 2) == [False, False]
    tree["parallel"] = {}
    assert all(pool.run(run_training, 1, tree))
    losses = [row["loss"] for row in read_metrics(tmp_path)]
    assert losses == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["parallel.overlap_param_gather=true"], "needs parallel.overlap_grad_reduce=true"),
        (
            ["parallel.overlap_grad_reduce=true", "train.recompute_visual_chunk=4096"],
            "cannot go with train.recompute_visual_chunk",
        ),
        (["parallel.tp_comm_overlap=true"], "needs data.fixed_rows=true"),
        (["parallel.tp_comm_overlap=true", "parallel.sp=false"], "needs parallel.sp=true"),
        (
            [
                *("parallel.tp_comm_overlap=true", "data.fixed_rows=true"),
                "model.transformer_impl=local",
            ],
            "needs Transformer Engine",
        ),
        (
            [
                *("parallel.tp_comm_overlap=true", "data.fixed_rows=true"),
                "train.fp8=blockwise",
            ],
            "cannot go with train.fp8=blockwise",
        ),
        (["parallel.first_stage_layers=42"], "must leave layers"),
        (["parallel.first_stage_layers=20", "parallel.pp=1"], "needs --pp of at least 2"),
        (["parallel.first_stage_layers=3", "parallel.pp=3"], "cannot be dealt evenly"),
        (["parallel.first_stage_layers=21", "parallel.vpp=2"], "parallel.vpp"),
        (["train.recompute_modules=[layernorm]"], "train.recompute=selective"),
        (["train.recompute=selective", "train.recompute_modules=[norms]"], "is unknown"),
        (["train.recompute=selective", "train.recompute_modules=[]"], "at least one"),
        (
            [
                *("train.recompute=selective", "train.recompute_modules=[layernorm]"),
                "model.transformer_impl=local",
            ],
            "needs Transformer Engine",
        ),
        (["train.recompute_layers=3", "train.recompute=none"], "train.recompute=full"),
    ],
)
def test_what_megatron_core_refuses_is_refused_here_in_one_line(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_config(load_config("configs/gemma_pt.yaml", [*STAGES, *settings]))
    assert "\n" not in str(caught.value)
