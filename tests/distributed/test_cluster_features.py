"""Features of clusters: what cannot go together is refused before Megatron-Core refuses it."""

import pytest

from dattn_mcore.config.checks import check_config
from dattn_mcore.config.load import load_config
from dattn_mcore.errors import ConfigError

# The shipped run with pipeline stages, without what it overlaps and FP8.
STAGES = [
    "parallel.pp=2",
    "train.fp8=none",
    "parallel.overlap_grad_reduce=false",
    "parallel.overlap_param_gather=false",
]


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
                "parallel.tp_comm_overlap=true",
                "data.fixed_rows=true",
                "train.transformer_impl=local",
            ],
            "needs Transformer Engine",
        ),
        (
            [
                "parallel.tp_comm_overlap=true",
                "data.fixed_rows=true",
                "train.fp8=blockwise",
            ],
            "cannot go with train.fp8=blockwise",
        ),
        (["parallel.first_stage_layers=42"], "must leave layers"),
        (["parallel.first_stage_layers=20", "parallel.pp=1"], "needs --pp of at least 2"),
        (["parallel.first_stage_layers=3", "parallel.pp=3"], "cannot be divided evenly"),
        (["parallel.first_stage_layers=21", "parallel.vpp=2"], "parallel.vpp"),
        (["train.recompute_modules=[layernorm]"], "train.recompute=selective"),
        (["train.recompute=selective", "train.recompute_modules=[norms]"], "is unknown"),
        (["train.recompute=selective", "train.recompute_modules=[]"], "at least one"),
        (
            [
                "train.recompute=selective",
                "train.recompute_modules=[layernorm]",
                "train.transformer_impl=local",
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
