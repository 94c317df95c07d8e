"""Cross entropy of a few rows over a wide vocabulary, without ever holding all logits.

Logits of a chunk of rows are computed, reduced to three numbers a row, and dropped; backward
computes them again. The vocabulary is split over the tensor parallel group: forward communicates
three numbers a row, backward the gradient of the rows once, however many chunks there are.

Source: the fused linear cross entropy that several projects have; the vocabulary split is that of
Megatron-Core's `vocab_parallel_cross_entropy`, whose losses these equal.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import get_pg_rank, get_pg_size


def cap_and_mask(logits: torch.Tensor, softcap: float | None, entries: int) -> torch.Tensor:
    """Applies the soft-cap, and minus infinity to vocabulary padding.

    Args:
        logits: float32 [..., vocabulary of this rank]; overwritten.
        softcap: logits become softcap * tanh(logits / softcap); None for no cap.
        entries: of this rank's, those that carry meaning (others follow; may be negative).
    """
    if softcap is not None:
        logits = logits.div_(softcap).tanh_() * softcap  # not in place: tanh's backward needs it
    if entries < logits.shape[-1]:
        padding = torch.arange(logits.shape[-1], device=logits.device) >= entries
        logits = logits.masked_fill_(padding, -torch.inf)
    return logits


def chunked_cross_entropy(
    rows: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    chunk: int,
    softcap: float | None,
    vocab_size: int,
    tp_group: dist.ProcessGroup,
) -> torch.Tensor:
    """Losses of supervised rows.

    The weight's gradient is summed over chunks in float32: into `weight.main_grad` where
    Megatron-Core's DDP made one, by the protocol of its own fused weight gradients.

    Args:
        rows: [rows, hidden], the same on every tensor parallel rank.
        weight: [padded vocabulary / tp, hidden].
        labels: int64 [rows], ids below vocab_size.
        chunk: rows whose logits are in memory at once.
        softcap: the final soft-cap; None for none.
        vocab_size: ids that carry meaning; the padding behind them takes no part.
        tp_group: over which the vocabulary is split.

    Returns:
        float32 [rows], the same on every tensor parallel rank.
    """
    return _ChunkedCrossEntropy.apply(rows, weight, labels, chunk, softcap, vocab_size, tp_group)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, labels, chunk, softcap, vocab_size, tp_group):
        ctx.chunk, ctx.softcap, ctx.tp_group = chunk, softcap, tp_group
        first = get_pg_rank(tp_group) * weight.shape[0]
        ctx.entries, own_labels = vocab_size - first, labels - first
        is_own = (own_labels >= 0) & (own_labels < weight.shape[0])
        own_labels = own_labels.masked_fill(~is_own, 0)
        top = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
        sums = torch.empty(2, *top.shape, dtype=torch.float32, device=rows.device)
        for part in _parts(rows, chunk):
            logits = _logits(ctx, rows[part], weight)
            # A rank may hold nothing but padding.
            top[part] = logits.amax(-1).clamp_min_(torch.finfo(torch.float32).min)
            sums[1, part] = logits.gather(1, own_labels[part, None])[:, 0]
            sums[0, part] = logits.sub_(top[part, None]).exp_().sum(-1)
        sums[1].masked_fill_(~is_own, 0.0)
        if get_pg_size(tp_group) > 1:
            own_top = top.clone()
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=tp_group)
            sums[0] *= (own_top - top).exp_()
            dist.all_reduce(sums, group=tp_group)
        lse = sums[0].log().add_(top)
        ctx.save_for_backward(rows, weight, own_labels, is_own, lse)
        return lse - sums[1]

    @staticmethod
    def backward(ctx, grad):
        rows, weight, own_labels, is_own, lse = ctx.saved_tensors
        d_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        gradient = _WeightGradient(weight) if ctx.needs_input_grad[1] else None
        for part in _parts(rows, ctx.chunk):
            logits = _logits(ctx, rows[part], weight)
            slope = None
            if ctx.softcap is not None:
                slope = 1.0 - (logits / ctx.softcap).square_()
            d_logits = logits.sub_(lse[part, None]).exp_()
            d_logits.scatter_add_(1, own_labels[part, None], -is_own[part, None].float())
            d_logits.mul_(grad[part, None])
            if slope is not None:
                # Vocabulary padding has an infinite slope and no gradient.
                d_logits.mul_(slope.masked_fill_(slope.isinf(), 0.0))
            d_logits = d_logits.to(rows.dtype)
            if d_rows is not None:
                torch.mm(d_logits, weight, out=d_rows[part])
            if gradient is not None:
                gradient.add(d_logits.t() @ rows[part])
        if d_rows is not None and get_pg_size(ctx.tp_group) > 1:
            dist.all_reduce(d_rows, group=ctx.tp_group)
        d_weight = gradient.result() if gradient is not None else None
        return d_rows, d_weight, None, None, None, None, None


def _logits(ctx: Any, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    logits = rows @ weight.t()
    logits = logits.float() if logits.dtype is not torch.float32 else logits
    return cap_and_mask(logits, ctx.softcap, ctx.entries)


def _parts(rows: torch.Tensor, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, rows.shape[0], chunk)]


class _WeightGradient:
    """Sums a weight's gradient over chunks in float32.

    With Megatron-Core's DDP it adds to `main_grad` right away and hands autograd a stand-in,
    which DDP's hook drops because of `grad_added_to_main_grad`, or adds, and then it must be zero,
    where another use of the weight brings a gradient too (`zero_out_wgrad`: tied embeddings).
    Source: Megatron-Core 0.16.1 `LinearWithGradAccumulationAndAsyncCommunication`.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.total: torch.Tensor | None = getattr(weight, "main_grad", None)
        self.into_main = self.total is not None

    def add(self, part: torch.Tensor) -> None:
        """Adds [vocabulary / tp, hidden] of a chunk."""
        if self.total is None:
            self.total = part.float()
        else:
            self.total.add_(part)

    def result(self) -> torch.Tensor:
        """What autograd gets."""
        if not self.into_main:
            assert self.total is not None
            return self.total.to(self.weight.dtype)
        self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        if getattr(self.weight, "zero_out_wgrad", False):
            return torch.zeros_like(self.weight)
        return torch.empty_like(self.weight)
