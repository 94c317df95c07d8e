"""Text rows attend to visual and text rows that are divided over a context parallel group.

Visual keys and values never travel. Forward: the queries of all text rows go to every rank, which
attends to its own visual rows; outputs and log-sum-exps go back to the rows' owners. Keys and
values of text rows go to every rank, whose own queries attend to them causally. An owner merges
what it got into one softmax. Backward, the merged output and log-sum-exp go the same ways
(`merge`). What is sent is proportional to the text rows, whatever the number of visual rows.

The exchanges go on beside the part that does not need them, where the device allows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dattn_mcore.layers.attention.backend import Backend, Part
from dattn_mcore.layers.attention.inputs import AttentionInputs
from dattn_mcore.layers.attention.modes import divided_key_sets
from dattn_mcore.layers.attention.options import AttentionOptions
from dattn_mcore.layers.blocks import ContextRows


def attend_in_context(
    inputs: AttentionInputs,
    options: AttentionOptions,
    backend: Backend,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Attention of this rank's text rows, over the rows of all ranks.

    Args:
        inputs: rows of this rank; `params.context` is set. V_r and T_r rows on every rank.
        options: what the layer computes; `v2v=diagonal`.
        backend: computes the parts.
        group: context parallel group.

    Returns:
        Output of the text rows [T_r, heads, head_dim]; padding rows are zero.
    """
    params, context = inputs.params, inputs.params.context
    assert context is not None
    over_visual, over_text = divided_key_sets(context, options)
    rotated = inputs.rotated_queries("text")
    parts = _Parts(
        visual=backend.part(over_visual, params, options, inputs.q.device),
        text=backend.part(over_text, params, options, inputs.q.device),
        one_softmax=options.merge == "alpha",
        context=context,
        group=group,
    )
    return _DividedSoftmax.apply(
        parts,
        inputs.q if options.debiased else rotated,
        inputs.keys("visual") if options.debiased else inputs.rotated_keys("visual"),
        inputs.values("visual"),
        rotated,
        inputs.rotated_keys("text"),
        inputs.values("text"),
    )


@dataclass
class _Pending:
    """A tensor that is on its way.

    Attributes:
        rows: of all ranks, one rank's after the other's.
        work: ends when they are there.
        place: order in which they are wanted; None: as they come.
    """

    rows: torch.Tensor
    work: Any
    place: torch.Tensor | None = None

    def wait(self) -> torch.Tensor:
        """The tensor; later kernels of this stream may read it."""
        self.work.wait()
        return self.rows if self.place is None else self.rows[self.place]


@dataclass(frozen=True)
class _Parts:
    """What a rank computes of a layer's softmaxes, and its exchanges.

    Attributes:
        visual: all text rows over this rank's visual rows.
        text: this rank's text rows over all text rows.
        one_softmax: both share one (`merge=alpha`); else their outputs are added.
        context: whose rows are where.
        group: context parallel group.
    """

    visual: Part
    text: Part
    one_softmax: bool
    context: ContextRows
    group: dist.ProcessGroup

    @property
    def has_visual(self) -> bool:
        """Whether any rank has visual rows."""
        return self.context.num_visual > 0

    def gather(self, rows: torch.Tensor) -> _Pending:
        """From this rank's text rows [T_r, ...] to those of the pack [T, ...], in its order."""
        whole = rows.new_empty((self.context.num_text, *rows.shape[1:]))
        work = dist.all_gather_into_tensor(whole, rows.contiguous(), self.group, async_op=True)
        return _Pending(whole, work, self.context.place)

    def to_owners(self, rows: torch.Tensor) -> _Pending:
        """From text rows of the pack [T, ...] to [ranks * T_r, ...]: each rank's for these rows."""
        sent = rows[self.context.order]
        received = torch.empty_like(sent)
        work = dist.all_to_all_single(received, sent, group=self.group, async_op=True)
        return _Pending(received, work)

    def by_rank(self, pending: _Pending) -> torch.Tensor:
        """[ranks, T_r, ...] of what `to_owners` brought."""
        return pending.wait().unflatten(0, (self.context.ranks, -1))

    def summed(self, pending: _Pending) -> torch.Tensor:
        """Sum over the ranks, in float32 or wider."""
        found = self.by_rank(pending)
        return found.to(torch.promote_types(found.dtype, torch.float32)).sum(0)


def merge_parts(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax from some that have no key in common.

    Args:
        outs: [parts, rows, heads, head_dim].
        lses: [parts, rows, heads], minus infinity where a row saw nothing.

    Returns:
        Output [rows, heads, head_dim] in the dtype of `lses`, zero where no part saw anything; and
        log-sum-exp [rows, heads].
    """
    lse = torch.logsumexp(lses, dim=0)
    # Two infinities have no difference.
    weights = torch.exp(lses - lse.masked_fill(lse == -torch.inf, 0.0))
    return (outs.to(lse.dtype) * weights[..., None]).sum(0), lse


class _DividedSoftmax(torch.autograd.Function):
    """Queries, keys and values of the visual part, then of the text part, all of this rank."""

    @staticmethod
    def forward(ctx, parts, q_visual, k_visual, v_visual, q_text, k_text, v_text):
        groups = k_text.shape[1]
        asking = parts.gather(q_visual) if parts.has_visual else None
        answering = parts.gather(torch.cat([k_text, v_text], dim=1))
        visual_state, q_all, received = None, None, None
        if asking is not None:
            q_all = asking.wait()
            out, lse, visual_state = parts.visual.forward(q_all, k_visual, v_visual)
            received = parts.to_owners(out), parts.to_owners(lse)
        keys_values = answering.wait()
        k_all, v_all = keys_values[:, :groups], keys_values[:, groups:]
        out, lse, text_state = parts.text.forward(q_text, k_all, v_all)
        outs, lses = [out[None]], [lse[None]]
        if received is not None:
            outs.insert(0, parts.by_rank(received[0]))
            lses.insert(0, parts.by_rank(received[1]))
        found = [(torch.cat(outs), torch.cat(lses))]
        if not parts.one_softmax:
            found = list(zip(outs, lses, strict=True))
        results = [merge_parts(*one) for one in found]
        results = [(out.to(q_text.dtype), lse) for out, lse in results]
        ctx.parts, ctx.states, ctx.count = parts, (visual_state, text_state), len(results)
        ctx.save_for_backward(
            q_all, k_visual, v_visual, q_text, k_all, v_all, *(x for one in results for x in one)
        )
        return sum((out for out, _ in results[1:]), results[0][0])

    @staticmethod
    def backward(ctx, grad):
        parts, (visual_state, text_state) = ctx.parts, ctx.states
        q_all, k_visual, v_visual, q_text, k_all, v_all, *results = ctx.saved_tensors
        heads = grad.shape[1]
        asking = None
        if parts.has_visual:  # the first of the results is the one that has visual keys
            asking = parts.gather(torch.cat([grad, results[0]], 1)), parts.gather(results[1])
        d_q_text, d_k, d_v = parts.text.backward(
            grad, q=q_text, k=k_all, v=v_all, out=results[-2], lse=results[-1], state=text_state
        )
        answering = parts.to_owners(torch.cat([d_k, d_v], dim=1))
        d_q_visual, d_k_visual, d_v_visual = None, None, None
        if asking is not None:
            both, lse = asking[0].wait(), asking[1].wait()
            d_q, d_k_visual, d_v_visual = parts.visual.backward(
                both[:, :heads],
                q=q_all,
                k=k_visual,
                v=v_visual,
                out=both[:, heads:],
                lse=lse,
                state=visual_state,
            )
            d_q_visual = parts.summed(parts.to_owners(d_q)).to(grad.dtype)
        d_keys_values = parts.summed(answering).to(k_all.dtype)
        d_k_text, d_v_text = d_keys_values.chunk(2, dim=1)
        return None, d_q_visual, d_k_visual, d_v_visual, d_q_text, d_k_text, d_v_text
