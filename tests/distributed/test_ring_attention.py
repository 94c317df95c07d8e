"""The ring that context parallelism is compared with: it is causal attention, and so are its bytes."""

import pytest
import torch

from tests.distributed.ring_jobs import divided_ring, exchanged

HEADS, GROUPS, SIZE, SCALE = 6, 2, 4, 0.7


def dense(tensors, grad):
    """One softmax a row in float64: output and gradients of q, k, v."""
    q, k, v = (tensor.clone().requires_grad_() for tensor in tensors)
    keys, values = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, keys) * SCALE
    later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    share = scores.masked_fill(later, -torch.inf).softmax(-1)
    out = torch.einsum("hqk,khd->qhd", share, values)
    out.backward(grad)
    return out.detach(), [q.grad, k.grad, v.grad]


# Pieces longer than a matrix of scores, and shorter; a ring of one rank sends nothing.
@pytest.mark.parametrize(("ranks", "rows"), [(1, 10), (2, 300), (3, 18), (4, 520)])
def test_it_is_one_causal_softmax(pool, ranks, rows):
    generator = torch.Generator().manual_seed(5)
    shapes = [(rows, HEADS, SIZE), (rows, GROUPS, SIZE), (rows, GROUPS, SIZE), (rows, HEADS, SIZE)]
    *tensors, grad = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    wanted, gradients = dense(tensors, grad)
    seen = torch.zeros(rows, dtype=torch.int64)
    for own, out, grads, sent in pool.run(divided_ring, ranks, tensors, grad, SCALE):
        seen[own] += 1
        torch.testing.assert_close(out, wanted[own], rtol=0, atol=1e-12)
        for found, whole in zip(grads, gradients, strict=True):
            torch.testing.assert_close(found, whole[own], rtol=0, atol=1e-12)
        keys_and_values = rows // ranks * 2 * GROUPS * SIZE * 8
        assert sent == ((ranks - 1) * keys_and_values, (ranks - 1) * 2 * keys_and_values)
    assert (seen == 1).all()


def test_what_a_rank_keeps_for_itself_is_not_sent(pool):
    for rank, records in enumerate(pool.run(exchanged, 2)):
        given, kept = [(4, 1), (7, 5)][rank]
        assert records == [
            ("all_to_all", "cp", 48, 24),
            ("all_to_all", "cp", 8 * given, 8 * (given - kept)),
            ("send", "cp", 28, 28),
            ("receive", "cp", 28, 0),
        ]
