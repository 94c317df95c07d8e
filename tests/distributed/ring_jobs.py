"""What the pool's workers run: ring attention over rows that are divided over all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from benchmarks.ring_attention import ring_attention, ring_rows
from dattn_mcore.parallel.collectives import Tracer


def divided_ring(tensors, grad, scale):
    """This rank's rows, its output and gradients there, and the bytes that it sent.

    Args:
        tensors: q, k, v of all rows; all ranks have the same.
        grad: of the whole output.
        scale: of the scores.
    """
    own = ring_rows(len(grad), dist.get_rank(), dist.get_world_size())
    leaves = [tensor[own].clone().requires_grad_() for tensor in tensors]
    q, k, v = leaves
    with Tracer({}) as tracer:
        out = ring_attention(q, k, v, scale, dist.group.WORLD)
        forward = sum(one.sent for one in tracer.collectives)
        out.backward(grad[own])
        sent = sum(one.sent for one in tracer.collectives)
    return own, out.detach(), [leaf.grad for leaf in leaves], (forward, sent - forward)


def exchanged():
    """What the tracer records of calls in which a rank keeps a part for itself."""
    rank = dist.get_rank()
    with Tracer({dist.group.WORLD.group_name: "cp"}) as tracer:
        dist.all_to_all_single(torch.empty(6, 2), torch.ones(6, 2))
        given = [1, 3] if rank == 0 else [2, 5]
        got = [1, 2] if rank == 0 else [3, 5]
        dist.all_to_all_single(torch.empty(sum(got), 2), torch.ones(sum(given), 2), got, given)
        work = dist.isend(torch.ones(7), 1 - rank)
        dist.recv(torch.empty(7))
        work.wait()
    return [(one.operation, one.group, one.nbytes, one.sent) for one in tracer.collectives]
