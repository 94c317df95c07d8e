"""Keys of one softmax divided over ranks: output and gradients are those of a single process."""

import pytest
import torch

from tests.distributed.merge_jobs import divided_softmax

QUERIES, KEYS, HEADS, SIZE = 6, 11, 2, 4
# Of each rank: its calls, as spans of query rows and of key rows. Query 0 sees nothing at all, query
# 1 keys of the first rank alone, and the last rank has no key.
SPANS = [[((1, 6), (0, 4)), ((3, 6), (4, 6))], [((2, 6), (6, 11))], []]


def visible():
    mask = torch.zeros(QUERIES, KEYS, dtype=torch.bool)
    for calls in SPANS:
        for rows, keys in calls:
            mask[slice(*rows), slice(*keys)] = True
    return mask


@pytest.mark.parametrize("size", [1.0, 30.0], ids=["even", "sharp"])
def test_the_softmax_is_that_of_one_process(pool, size):
    generator = torch.Generator().manual_seed(7)
    shapes = [(QUERIES, HEADS, SIZE), (KEYS, HEADS, SIZE), (KEYS, HEADS, SIZE)]
    q, k, v, grad = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in (*shapes, shapes[0])
    )
    q = q * size
    results = pool.run(divided_softmax, len(SPANS), (q, k, v), grad, SPANS)

    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    scores = torch.einsum("qhd,khd->qhk", *leaves[:2])
    scores = scores.masked_fill(~visible()[:, None], -torch.inf)
    share = scores[1:].softmax(-1)
    out = torch.cat([torch.zeros(1, HEADS, SIZE), torch.einsum("qhk,khd->qhd", share, leaves[2])])
    out.backward(grad)
    for found, lse, _ in results:
        torch.testing.assert_close(found, out, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse[1:], scores[1:].logsumexp(-1), rtol=1e-12, atol=1e-12)
        assert (lse[0] == -torch.inf).all()
    for place, leaf in enumerate(leaves):  # a rank has nothing for keys of others
        total = sum(found[2][place] for found in results)
        torch.testing.assert_close(total, leaf.grad, rtol=1e-10, atol=1e-10)
    for place in (1, 2):
        assert not results[1][2][place][:6].any() and not results[0][2][place][6:].any()


def test_a_group_of_one_changes_nothing(pool):
    generator = torch.Generator().manual_seed(8)
    q, k, v, grad = (torch.randn(5, HEADS, SIZE, generator=generator) for _ in range(4))
    ((found, lse, _),) = pool.run(divided_softmax, 1, (q, k, v), grad, [[((0, 5), (0, 5))]])
    scores = torch.einsum("qhd,khd->qhk", q, k)
    torch.testing.assert_close(found, torch.einsum("qhk,khd->qhd", scores.softmax(-1), v))
    torch.testing.assert_close(lse, scores.logsumexp(-1))
