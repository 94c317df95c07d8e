"""One softmax over keys that come in several sets: outputs merged by their log-sum-exps.

Forward, every call gives its rows' output and log-sum-exp, which are merged as they come. Backward,
every call gets the *merged* output and the *merged* log-sum-exp, as in ring attention; the kernels
then produce the exact joint gradients, and no gradient through a log-sum-exp is ever needed (flash
kernels drop it silently).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from dattn_mcore.layers.attention.rows import Rows, add_rows, covers, put_rows


class KernelCall(Protocol):
    """Attention of some rows of a pack over some keys, in one call. No row stands twice.

    Attributes:
        q_rows, k_rows: the rows that ask, each of which sees a key, and those that answer.
    """

    q_rows: Rows
    k_rows: Rows

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Output [rows, heads, d], lse [rows, heads], and what the backward pass needs besides."""

    def backward(
        self,
        grad: torch.Tensor,
        *,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        state: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q, k, v for a given (merged) output and log-sum-exp."""


# The calls of a pass have no rows in common, those of several passes may.
Passes = list[list[KernelCall]]


class Merged:
    """Output and log-sum-exp of all rows over all that was added.

    Rows that see nothing have output zero and log-sum-exp minus infinity.

    Args:
        q: [rows, heads, head_dim].
        passes: that will be added; the sums of several are kept in float32 or wider.
    """

    def __init__(self, q: torch.Tensor, passes: int) -> None:
        self.dtype = q.dtype
        wide = torch.promote_types(q.dtype, torch.float32)
        self.out = torch.zeros(q.shape, dtype=wide if passes > 1 else q.dtype, device=q.device)
        self.lse = torch.full(q.shape[:2], -torch.inf, dtype=wide, device=q.device)
        self.empty = True

    def add(
        self, passes: Passes, *, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> list[Any]:
        """Computes all calls and merges them; returns their states, for `gradients`."""
        states = []
        for calls in passes:
            states += [self._add_call(call, q, k, v) for call in calls]
            self.empty = False
        return states

    def _add_call(self, call: KernelCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        rows = call.q_rows
        out, lse, state = call.forward(q[rows], k[call.k_rows], v[call.k_rows])
        if self.empty and covers(rows, self.out) and lse.dtype == self.lse.dtype:
            self.out, self.lse = out.to(self.out.dtype), lse
            return state
        if self.empty:
            put_rows(self.out, rows, out)
            put_rows(self.lse, rows, lse)
            return state
        before, lse = self.lse[rows], lse.to(self.lse.dtype)
        total = torch.logaddexp(before, lse)  # finite: every row of a call sees a key
        merged = self.out[rows]  # a view, where rows are a slice
        merged.mul_((before - total).exp_()[..., None])
        merged.add_(out * (lse - total).exp_()[..., None])
        if not isinstance(rows, slice):
            put_rows(self.out, rows, merged)
        put_rows(self.lse, rows, total)
        return state

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output in the queries' dtype, and log-sum-exp."""
        return self.out.to(self.dtype), self.lse


def gradients(
    passes: Passes,
    states: list[Any],
    grad: torch.Tensor,
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v through all calls, for the merged output and log-sum-exp."""

    def zeros(like: torch.Tensor) -> torch.Tensor:
        # The rows of a single pass are written once each: nothing is summed.
        wide = torch.promote_types(like.dtype, torch.float32)
        dtype = wide if len(passes) > 1 else like.dtype
        return torch.zeros(like.shape, dtype=dtype, device=like.device)

    calls = [call for one in passes for call in one]
    if len(calls) == 1 and covers(calls[0].q_rows, q) and covers(calls[0].k_rows, k):
        return calls[0].backward(grad, q=q, k=k, v=v, out=out, lse=lse, state=states[0])
    totals = zeros(q), zeros(k), zeros(v)
    put = add_rows if len(passes) > 1 else put_rows

    def add_call(call: KernelCall, state: Any) -> None:  # its copies are gone before the next's
        rows, keys = call.q_rows, call.k_rows
        found = call.backward(
            grad[rows],
            q=q[rows],
            k=k[keys],
            v=v[keys],
            out=out[rows],
            lse=lse[rows],
            state=state,
        )
        for total, at, values in zip(totals, (rows, keys, keys), found, strict=True):
            put(total, at, values)

    for call, state in zip(calls, states, strict=True):
        add_call(call, state)
    dq, dk, dv = (total.to(like.dtype) for total, like in zip(totals, (q, k, v), strict=True))
    return dq, dk, dv
