"""Ring attention, written plainly: causal self-attention over rows that are divided over ranks.

What D-Attn's context parallelism is compared with (`benchmarks.context_traffic`). Queries stay;
keys and values of all rows go round the ring, n - 1 turns forward. Backward they go round again,
and with them the gradients of the keys and values that each rank has seen, which come home with
the last of n - 1 turns. Rows are divided in a zigzag: they are cut into 2n pieces, of which a rank
holds one from the front and its mirror image from the back, so that causal work is even.

Scores are matrices, of a few query rows at a time: this is a reference, and no fast kernel.

Source: Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context"
(arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

QUERIES_AT_ONCE = 64  # rows of a matrix of scores


def ring_rows(rows: int, rank: int, ranks: int) -> torch.Tensor:
    """int64 [rows / ranks], the rows that a rank holds, in their order there.

    Raises:
        ValueError: the rows do not divide into two pieces a rank.
    """
    if rows % (2 * ranks):
        raise ValueError(f"{rows} rows do not divide into {2 * ranks} pieces, two a rank")
    pieces = torch.arange(rows).chunk(2 * ranks)
    return torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]])


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Causal self-attention over the rows of all ranks.

    Args:
        q: [rows / ranks, heads, head_dim], this rank's rows as `ring_rows` has them.
        k, v: [rows / ranks, groups, head_dim], likewise.
        scale: factor on q k^T.
        group: ranks of the ring.

    Returns:
        This rank's output [rows / ranks, heads, head_dim].
    """
    return _Ring.apply(q, k, v, scale, group)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, group):
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        out = torch.zeros_like(q)
        lse = q.new_full(q.shape[:2], -torch.inf)
        held = torch.cat([k, v], dim=1)
        for turn in range(ranks):
            coming = _pass_on(held, group) if turn < ranks - 1 else None
            for rows, keys, causal in _pairs(rank, (rank - turn) % ranks, len(q), ranks):
                k_here, v_here = held[keys].chunk(2, dim=1)
                found = _attend(q[rows], k_here, v_here, scale, causal)
                out[rows], lse[rows] = _merged(out[rows], lse[rows], *found)
            held = held if coming is None else _arrived(*coming)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.group = scale, group
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        rank, ranks = dist.get_rank(ctx.group), dist.get_world_size(ctx.group)
        delta = (grad * out).sum(-1)  # [rows, heads]
        d_q = torch.zeros_like(q)
        held, at_home, travelling = torch.cat([k, v], dim=1), None, None
        for turn in range(ranks):
            coming = _pass_on(held, ctx.group) if turn < ranks - 1 else None
            d_held = torch.zeros_like(held)
            for rows, keys, causal in _pairs(rank, (rank - turn) % ranks, len(q), ranks):
                k_here, v_here = held[keys].chunk(2, dim=1)
                found = _gradients(
                    grad[rows],
                    q=q[rows],
                    k=k_here,
                    v=v_here,
                    lse=lse[rows],
                    delta=delta[rows],
                    scale=ctx.scale,
                    causal=causal,
                )
                d_q[rows] += found[0]
                d_held[keys] += torch.cat(found[1:], dim=1)
            if turn == 0:
                at_home = d_held
            else:  # what other ranks found for these keys and values comes, and goes on
                travelling = d_held if travelling is None else travelling + d_held
                travelling = _arrived(*_pass_on(travelling, ctx.group))
            held = held if coming is None else _arrived(*coming)
        d_kv = at_home if travelling is None else at_home + travelling
        return d_q, *d_kv.chunk(2, dim=1), None, None


def _pass_on(rows: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, list[Any]]:
    """Starts to send to the next rank and to receive as much from the one before."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    after, before = (dist.get_global_rank(group, (rank + step) % ranks) for step in (1, -1))
    rows, received = rows.contiguous(), torch.empty_like(rows)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, rows, after, group),
            dist.P2POp(dist.irecv, received, before, group),
        ]
    )
    return received, works


def _arrived(received: torch.Tensor, works: list[Any]) -> torch.Tensor:
    for work in works:
        work.wait()
    return received


def _pairs(rank: int, source: int, rows: int, ranks: int) -> Iterator[tuple[slice, slice, bool]]:
    """Pieces of a rank's queries and of a rank's keys that see each other, and whether causally."""
    halves = slice(0, rows // 2), slice(rows // 2, rows)
    for mine, piece in zip(halves, (rank, 2 * ranks - 1 - rank), strict=True):
        for theirs, other in zip(halves, (source, 2 * ranks - 1 - source), strict=True):
            if other <= piece:
                yield mine, theirs, other == piece


def _scores(
    q: torch.Tensor, k: torch.Tensor, scale: float, first: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries by group [groups, heads / groups, rows, d], and scaled scores of all keys.

    Args:
        q: [rows, heads, d].
        k: [keys, groups, d].
        scale: factor on them.
        first: key that the first query sees last, each other one more; None: all see all.
    """
    groups = k.shape[1]
    by_group = q.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
    scores = (by_group @ k.permute(1, 2, 0)[:, None]).mul_(scale)
    if first is not None:
        last = torch.arange(first, first + len(q))[:, None]
        scores.masked_fill_(torch.arange(len(k)) > last, -torch.inf)
    return by_group, scores


def _spans(rows: int, keys: int, causal: bool) -> Iterator[tuple[slice, slice, int | None]]:
    """A few query rows at a time, the keys that they see, and `first` of `_scores`."""
    for start in range(0, rows, QUERIES_AT_ONCE):
        stop = min(start + QUERIES_AT_ONCE, rows)
        yield slice(start, stop), slice(0, stop if causal else keys), start if causal else None


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [rows, heads, d] and log-sum-exp [rows, heads] over one piece of keys."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    for rows, keys, first in _spans(len(q), len(k), causal):
        _, scores = _scores(q[rows], k[keys], scale, first)
        sums = scores.logsumexp(-1, keepdim=True)  # [groups, heads / groups, rows, 1]
        found = scores.sub_(sums).exp_() @ v[keys].transpose(0, 1)[:, None]
        out[rows] = found.permute(2, 0, 1, 3).flatten(1, 2)
        lse[rows] = sums[..., 0].permute(2, 0, 1).flatten(1, 2)
    return out, lse


def _merged(
    out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax of two that have no key in common; the second saw a key in each row."""
    total = torch.logaddexp(lse, new_lse)
    weight, new_weight = (lse - total).exp(), (new_lse - total).exp()
    return out * weight[..., None] + new_out * new_weight[..., None], total


def _gradients(
    grad: torch.Tensor,
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of q, k, v over one piece of keys, for the log-sum-exp of the whole softmax."""
    d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    groups = k.shape[1]

    def by_group(rows: torch.Tensor) -> torch.Tensor:  # [groups, heads / groups, rows, 1 or d]
        return rows.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)

    for rows, keys, first in _spans(len(q), len(k), causal):
        asking, scores = _scores(q[rows], k[keys], scale, first)
        share = scores.sub_(by_group(lse[rows, :, None])).exp_()
        d_out = by_group(grad[rows])
        d_v[keys] += _of_keys(share, d_out)
        d_scores = d_out @ v[keys].permute(1, 2, 0)[:, None]
        d_scores = d_scores.sub_(by_group(delta[rows, :, None])).mul_(share).mul_(scale)
        d_q[rows] = (d_scores @ k[keys].transpose(0, 1)[:, None]).permute(2, 0, 1, 3).flatten(1, 2)
        d_k[keys] += _of_keys(d_scores, asking)
    return d_q, d_k, d_v


def _of_keys(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[keys, groups, d], summed over the query rows and heads of a group."""
    return (weights.flatten(1, 2).transpose(1, 2) @ rows.flatten(1, 2)).transpose(0, 1)
