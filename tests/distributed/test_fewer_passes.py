"""What takes one pass gives what Megatron-Core's own passes give; and each is still needed.

That whole steps are those of plain PyTorch, clipping included, is held by `test_optim_groups`.
"""

from __future__ import annotations

import pytest
import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_scale
from torch.utils._python_dispatch import TorchDispatchMode

from dattn_mcore.config.load import merge
from dattn_mcore.parallel import fewer_passes
from tests.distributed.fewer_passes_jobs import gradients, shards_after_a_step
from tests.distributed.small_models import GEMMA, SMALL_MODEL

PACKS = (
    (((True, 16), (False, 9)), ((False, 5),)),
    (((False, 3), (True, 16), (False, 6)),),
)


@pytest.mark.parametrize("model", ["mistral", "gemma2"])
def test_gradients_added_in_products_are_those_of_autograd(pool, model):
    tree = {"model": merge(SMALL_MODEL, {"mistral": {}, "gemma2": GEMMA}[model])}
    (added,), (summed,) = (pool.run(gradients, 1, tree, PACKS, how) for how in (True, False))
    assert set(added) == set(summed)
    for name, gradient in added.items():
        torch.testing.assert_close(gradient, summed[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_the_optimizers_after_a_step(pool, precision):
    """In float32 they are views of each other, and nothing is copied; in bf16 it must still be."""
    tree = {"model": SMALL_MODEL, "train": {"precision": precision}}
    (found,) = pool.run(shards_after_a_step, 1, tree, PACKS[0])
    assert all(torch.equal(shard.to(weight.dtype), weight.flatten()) for _, shard, weight in found)
    wide = {weight.dtype for is_view, _, weight in found if is_view}
    assert wide == {torch.float32}
    assert all(is_view for is_view, _, _ in found) is (precision == "fp32")


class Copies(TorchDispatchMode):
    """Counts copies."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.copy_.default
        return func(*args, **(kwargs or {}))


def test_clipping_scales_in_place():
    fewer_passes.install()
    ours, theirs = torch.randn(7), torch.randn(7)
    theirs.copy_(ours)
    with Copies() as copies:
        clip_grads.multi_tensor_scale_impl(0, None, [[ours], [ours]], 0.25)
    assert copies.count == 0
    with Copies() as copies:
        local_multi_tensor_scale(0, None, [[theirs], [theirs]], 0.25)
    assert copies.count == 1, "Megatron-Core scales in place now: the mend is no longer needed"
    assert torch.equal(ours, theirs)
    target = torch.empty(7)
    clip_grads.multi_tensor_scale_impl(0, None, [[ours], [target]], 2.0)
    assert torch.equal(target, ours * 2)
