"""bfloat16 attention of the exported model: its scores are not rounded before the softmax.

Which path computes a batch depends on the batch, so that all must be as exact as PyTorch's own
attention, which keeps scores in float32. Oracle: the same queries, keys and values in float64.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dattn_mcore.hf.attention_dattn import KeySet, _eager
from dattn_mcore.hf.shared_attention_dattn import part

HEADS, GROUPS, WIDTH, KEYS = 8, 2, 64, 300
SCALE = WIDTH**-0.5


def drawn(queries: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """bfloat16 queries, keys, values with scores that reach 30, and who sees what."""
    torch.manual_seed(queries)
    query = (4 * torch.randn(2, HEADS, queries, WIDTH)).bfloat16()
    key = (2 * torch.randn(2, GROUPS, KEYS, WIDTH)).bfloat16()
    value = torch.randn(2, GROUPS, KEYS, WIDTH).bfloat16()
    visible = torch.rand(2, 1, queries, KEYS) < 0.7
    visible[..., 0] = True
    return query, key, value, visible


def exact(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp in float64."""
    key, value = (x.double().repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))
    scores = (query.double() @ key.transpose(2, 3) * SCALE).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1, keepdim=True)


@pytest.mark.parametrize("queries", [1, 5])
def test_the_log_sum_exp_is_that_of_unrounded_scores(queries: int) -> None:
    """Rounded to bfloat16, scores of 30 would be off by 0.06 each."""
    query, key, value, visible = drawn(queries)
    output, lse = exact(query, key, value, visible)
    found, found_lse = part(query, key, value, visible, SCALE, None)
    torch.testing.assert_close(found_lse.double(), lse, atol=1e-5, rtol=0)
    off = (found.double() - output).abs().max()
    assert off <= 2**-8 * value.abs().max()  # weights are rounded to bfloat16, 8 bits


@pytest.mark.parametrize("queries", [1, 5])
def test_plain_attention_is_as_exact_as_that_of_pytorch(queries: int) -> None:
    query, key, value, visible = drawn(queries)
    output, _ = exact(query, key, value, visible)
    theirs = F.scaled_dot_product_attention(
        query,
        key.repeat_interleave(HEADS // GROUPS, dim=1),
        value.repeat_interleave(HEADS // GROUPS, dim=1),
        attn_mask=visible,
        scale=SCALE,
    )
    ours = _eager([KeySet(query, key, value, visible)], SCALE, None)
    off, bound = ((x.double() - output).abs().max() for x in (ours, theirs))
    assert off <= 1.5 * bound
