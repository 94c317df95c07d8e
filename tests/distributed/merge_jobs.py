"""What the pool's workers run: one softmax whose keys are divided over the ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from dattn_mcore.layers.attention.merge import Merged, gradients


class DenseCall:
    """Scores as a matrix, in float64; softmax's gradient as in the text books."""

    def __init__(self, q_rows, k_rows):
        self.q_rows, self.k_rows = q_rows, k_rows

    def forward(self, q, k, v):
        scores = torch.einsum("qhd,khd->qhk", q, k)
        return torch.einsum("qhk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1), None

    def backward(self, grad, *, q, k, v, out, lse, state):
        share = (torch.einsum("qhd,khd->qhk", q, k) - lse[..., None]).exp()
        of_share = torch.einsum("qhd,khd->qhk", grad, v)
        of_score = share * (of_share - (grad * out).sum(-1, keepdim=True))
        return (
            torch.einsum("qhk,khd->qhd", of_score, k),
            torch.einsum("qhk,qhd->khd", of_score, q),
            torch.einsum("qhk,qhd->khd", share, grad),
        )


def divided_softmax(tensors, grad, spans):
    """Output, log-sum-exp and this rank's gradients.

    Args:
        tensors: q, k, v; all ranks have the same.
        grad: of the output.
        spans: of each rank: its calls, as spans of query rows and of key rows.
    """
    q, k, v = tensors
    calls = [DenseCall(slice(*rows), slice(*keys)) for rows, keys in spans[dist.get_rank()]]
    passes = [[call] for call in calls]
    merged = Merged(q, len(passes))
    states = merged.add(passes, q=q, k=k, v=v)
    out, lse = merged.result(dist.group.WORLD)
    return out, lse, gradients(passes, states, grad, q=q, k=k, v=v, out=out, lse=lse)
