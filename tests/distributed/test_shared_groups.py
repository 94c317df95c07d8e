"""More tensor parallel ranks than groups of keys and values: several ranks share a group.

Gemma 3 4B has 8 heads in 4 groups, Qwen2.5 3B 16 in 2. Loss, gradients and gradient norm must be
those of one process, and no weight may stand twice in a checkpoint.
"""

import pytest
import torch

from dattn_mcore.config.checks import check_config
from dattn_mcore.config.load import from_dict, merge
from dattn_mcore.errors import ConfigError
from tests.distributed.jobs import read_metrics, train_without_last_save
from tests.distributed.small_models import GEMMA3, OLMO2, QWEN2, SMALL_MODEL, small_config
from tests.distributed.visual_jobs import attention_gradients

LAYOUTS = (((True, 16), (False, 9)), ((False, 4), (True, 16), (False, 6), (True, 16), (False, 3)))
EIGHT = {  # sizes that eight ranks divide
    "llm": {"num_attention_heads": 8, "head_dim": 8, "ffn_hidden_size": 96},
    "vision": {"num_attention_heads": 8, "hidden_size": 32, "ffn_hidden_size": 48},
    "projector": {"ffn_hidden_size": 48},
}
CASES = {
    "tp4 on 2 groups, biases": (QWEN2, 4, {"num_query_groups": 2}, {}),
    "tp8 on 2 groups, biases, sp": (QWEN2, 8, {"num_query_groups": 2}, {"sp": True}),
    "tp8 on 4 groups, norms of heads": (GEMMA3, 8, {"num_query_groups": 4}, {}),
    "tp8 on 4 groups, norms of all heads": (OLMO2, 8, {"num_query_groups": 4}, {}),
    "tp4 on 2 groups, norms of all heads, sp": (OLMO2, 4, {"num_query_groups": 2}, {"sp": True}),
    "tp4 on 1 group, norms, sp": (GEMMA3, 4, {"num_query_groups": 1}, {"sp": True}),
}


def tree_of(family, groups):
    return {"model": merge(merge(merge(SMALL_MODEL, EIGHT), family), {"llm": groups})}


def whole(results):
    """Gradients by key, put together from the ranks' shards, each place written alike; norm, loss."""
    found, norms, losses = {}, set(), []
    for shards, norm, loss in results:
        losses += [] if loss is None else [loss]
        norms.add(round(norm, 6))
        for key, shape, offset, gradient in shards:
            tensor = found.setdefault(key, torch.full(shape, torch.nan))
            spans = [
                slice(start, start + size)
                for start, size in zip(
                    offset, (1,) * (len(shape) - gradient.dim()) + gradient.shape, strict=True
                )
            ]
            before = tensor[tuple(spans)]
            gradient = gradient.view(before.shape)
            if not before.isnan().all():  # a weight that every rank holds
                torch.testing.assert_close(before, gradient, rtol=0, atol=0)
            tensor[tuple(spans)] = gradient
    (norm,), (loss,) = norms, losses
    return found, norm, loss


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "unfolded"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process(pool, name, fold):
    family, tp, groups, parallel = CASES[name]
    attention = {"attention": {"fold_visual_projection": fold}}
    tree = {**tree_of(family, groups), **attention}
    shared = {**tree, "parallel": {"tp": tp, **parallel}}
    found, norm, loss = whole(pool.run(attention_gradients, tp, shared, LAYOUTS))
    expected, want, plain = whole(pool.run(attention_gradients, 1, tree, LAYOUTS))
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.abs().max() > 1e-4, key
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=2e-5, msg=key)
    assert norm == pytest.approx(want, rel=1e-5)
    assert loss == pytest.approx(plain, rel=1e-5)  # float32 sums in another order


@pytest.mark.parametrize("name", ["tp4 on 2 groups, biases", "tp8 on 4 groups, norms of heads"])
def test_training_is_that_of_one_process(pool, digits, tmp_path, name):
    family, tp, groups, parallel = CASES[name]
    model = tree_of(family, groups)["model"]
    rows = {}
    for ranks in (1, tp):
        layout = {"tp": ranks, **(parallel if ranks > 1 else {})}
        tree = small_config(digits, tmp_path / str(ranks), model=model, parallel=layout)
        assert all(pool.run(train_without_last_save, ranks, tree))
        rows[ranks] = read_metrics(tmp_path / str(ranks))
    for ours, plain in zip(rows[tp], rows[1], strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("heads", "groups", "tp", "message"),
    [
        (28, 4, 8, "num_attention_heads=28.* must be a multiple of parallel.tp=8"),  # Qwen2.5 7B
        (12, 3, 4, "num_query_groups=3 must be a multiple of parallel.tp=4"),
    ],
)
def test_what_ranks_cannot_divide_is_refused(heads, groups, tp, message):
    llm = {"num_attention_heads": heads, "num_query_groups": groups, "ffn_hidden_size": 96}
    tree = tree_of({"llm": llm}, {})
    with pytest.raises(ConfigError, match=message):
        check_config(from_dict({**tree, "parallel": {"tp": tp}}))
