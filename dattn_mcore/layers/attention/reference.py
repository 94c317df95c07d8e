"""The oracle: decomposed attention written plainly, sample by sample, in any floating dtype.

It follows section 3 of arXiv 2502.01906 literally: two softmaxes, each with its log-sum-exp, and
alpha = sigmoid(lse_V - lse_T). It keeps whole score matrices and is differentiated by autograd.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from dattn_mcore.layers.attention.inputs import AttentionInputs
from dattn_mcore.layers.attention.modes import (
    Causal,
    InBlocks,
    InChunks,
    KeySet,
    Softmax,
    attend,
)
from dattn_mcore.layers.attention.options import AttentionOptions
from dattn_mcore.layers.blocks import Block
from dattn_mcore.layers.layout import DecomposedSeqParams

OutputAndLse = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class ReferenceBackend:
    """See the module."""

    name: str = "reference"
    needs_gpu: bool = False

    def refuses(
        self, options: AttentionOptions, device_type: str, dtype: torch.dtype, head_dim: int
    ) -> str | None:
        """See `Backend`."""
        return None

    def describe(self, head_dim: int) -> str:
        """See `Backend`: why no other one computes the model says enough."""
        return ""

    def attend(
        self, inputs: AttentionInputs, options: AttentionOptions
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend`."""
        return attend(inputs, options, lambda softmax: _compute(softmax, inputs, options))

    def part(
        self,
        key_set: KeySet,
        params: DecomposedSeqParams,
        options: AttentionOptions,
        device: torch.device,
    ) -> ReferencePart:
        """See `Backend`."""
        sees, context = key_set.sees, params.context
        assert not isinstance(sees, Causal) and context is not None
        asking, answering = context.text_positions, params.visual_positions
        if isinstance(sees, InChunks):
            asking, answering = params.text_positions, context.text_positions
            seen = InChunks(sees.chunks, None).blocks()
        else:
            seen = sees.blocks
        return ReferencePart(seen, sees.window, asking, answering, options)


@dataclass(frozen=True)
class ReferencePart:
    """See `Part`: scores as a matrix, and the gradient of a softmax as in the text books.

    Attributes:
        blocks: what each row sees of the keys, but for the window.
        window: keys that are this many positions or more before the query are not seen; None: all
            are.
        asking, answering: int64, positions of the rows and of the keys.
        options: what the layer computes.
    """

    blocks: tuple[Block, ...]
    window: int | None
    asking: torch.Tensor
    answering: torch.Tensor
    options: AttentionOptions

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """See `Part`."""
        out, lse = _softmax_part(q, k, v, self._visible(q, k), self.options)
        return out.to(q.dtype), lse, None

    def backward(
        self,
        grad: torch.Tensor,
        *,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        state: None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Part`."""
        visible = self._visible(q, k)[:, None, :]
        wide = lse.dtype
        repeat = q.shape[1] // k.shape[1]
        queries, grads = q.to(wide), grad.to(wide)
        keys, values = (x.to(wide).repeat_interleave(repeat, dim=1) for x in (k, v))
        logits = _logits(queries, keys, self.options)
        weights = torch.exp((logits - lse[..., None]).masked_fill(~visible, -torch.inf))
        delta = (grads * out.to(wide)).sum(-1, keepdim=True)
        slope = weights * (torch.einsum("qhd,khd->qhk", grads, values) - delta)
        if self.options.softcap is not None:
            slope = slope * (1 - (logits / self.options.softcap) ** 2)
        slope = slope * self.options.scale

        def of_groups(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
            return rows.unflatten(1, (-1, repeat)).sum(2).to(like.dtype)

        return (
            torch.einsum("qhk,khd->qhd", slope, keys).to(q.dtype),
            of_groups(torch.einsum("qhk,qhd->khd", slope, queries), k),
            of_groups(torch.einsum("qhk,qhd->khd", weights, grads), v),
        )

    def _visible(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Bool [rows, keys]."""
        visible = torch.zeros(len(q), len(k), dtype=torch.bool, device=q.device)
        for block in self.blocks:
            rows = slice(block.text_start, block.text_stop)
            visible[rows, block.visual_start : block.visual_stop] = True
        if self.window is None:
            return visible
        return visible & (self.asking[:, None] - self.answering[None, :] < self.window)


BACKEND = ReferenceBackend()


def _compute(softmax: Softmax, inputs: AttentionInputs, options: AttentionOptions) -> torch.Tensor:
    """Output [rows, heads, head_dim] of a softmax, zero on padding rows."""
    sets = [(key_set, *_rows_of(key_set, softmax, inputs)) for key_set in softmax.key_sets]
    like = inputs.queries(softmax.queries)
    outputs = []
    for stop, length in zip(itertools.accumulate(softmax.lengths), softmax.lengths, strict=True):
        rows = slice(stop - length, stop)
        parts = []
        for key_set, q, k, v in sets:
            keys, visible = _seen(key_set, rows, softmax, inputs)
            parts.append(_softmax_part(q[rows], k[keys], v[keys], visible, options))
        outputs.append(_merge(*parts) if len(parts) == 2 else parts[0][0])
    return _pad_rows(outputs, like)


def _rows_of(
    key_set: KeySet, softmax: Softmax, inputs: AttentionInputs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of a set."""
    values = inputs.values(key_set.rows)
    if key_set.rotated:
        queries = inputs.rotated_queries(softmax.queries)
        return queries, inputs.rotated_keys(key_set.rows), values
    return inputs.queries(softmax.queries), inputs.keys(key_set.rows), values


def _seen(
    key_set: KeySet, rows: slice, softmax: Softmax, inputs: AttentionInputs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that any of a sample's query rows sees, int64 [keys], and who sees them.

    The latter is bool [query rows, keys].
    """
    device = inputs.q.device
    row = torch.arange(rows.start, rows.stop, device=device)
    assert not isinstance(key_set.sees, InChunks)
    if isinstance(key_set.sees, Causal):
        keys, visible = row, row[:, None] >= row[None, :]
    else:
        keys, visible = _seen_in_blocks(key_set.sees, row, rows)
    if key_set.sees.window is not None:
        asking = inputs.positions(softmax.queries)[row]
        answering = inputs.positions(key_set.rows)[keys]
        visible = visible & (asking[:, None] - answering[None, :] < key_set.sees.window)
    return keys, visible


def _seen_in_blocks(
    sees: InBlocks, row: torch.Tensor, rows: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_seen` of the blocks alone."""
    blocks = [b for b in sees.blocks if b.text_start < rows.stop and rows.start < b.text_stop]
    first = min((block.visual_start for block in blocks), default=0)
    last = max((block.visual_stop for block in blocks), default=0)
    keys = torch.arange(first, last, device=row.device)
    visible = torch.zeros(len(row), len(keys), dtype=torch.bool, device=row.device)
    for block in blocks:
        asks = (row >= block.text_start) & (row < block.text_stop)
        answers = (keys >= block.visual_start) & (keys < block.visual_stop)
        visible |= asks[:, None] & answers[None, :]
    seen = visible.any(0)
    return keys[seen], visible[:, seen]


def _softmax_part(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    options: AttentionOptions,
) -> OutputAndLse:
    """Softmax attention over one set of keys, and its log-sum-exp.

    q is [rows, heads, head_dim]; k and v [keys, groups, head_dim]; visible bool [rows, keys].

    Returns:
        output [rows, heads, head_dim], zero where nothing is visible; lse [rows, heads], minus
        infinity there. Computed in at least float32.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    logits = _logits(q.to(compute), k.to(compute), options)
    if k.shape[0] == 0:
        return torch.zeros_like(q, dtype=compute), logits.new_full(q.shape[:2], -torch.inf)
    visible = visible[:, None, :].expand_as(logits)
    top = logits.masked_fill(~visible, -torch.inf).amax(-1, keepdim=True).detach()
    top = top.masked_fill(top.isinf(), 0.0)
    weights = torch.exp((logits - top).masked_fill(~visible, -torch.inf))
    total = weights.sum(-1)
    sees = total > 0
    safe_total = total.masked_fill(~sees, 1.0)
    output = torch.einsum("qhk,khd->qhd", weights, v.to(compute)) / safe_total[..., None]
    lse = (safe_total.log() + top[..., 0]).masked_fill(~sees, -torch.inf)
    return output, lse


def _logits(q: torch.Tensor, k: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    """[rows, heads, keys] of q [rows, heads, head_dim] and k [keys, heads, head_dim]."""
    logits = torch.einsum("qhd,khd->qhk", q, k) * options.scale
    if options.softcap is None:
        return logits
    return options.softcap * torch.tanh(logits / options.softcap)


def _merge(visual: OutputAndLse, text: OutputAndLse) -> torch.Tensor:
    """Joins the parts over visual and over text keys by their alpha weights."""
    (out_v, lse_v), (out_t, lse_t) = visual, text
    has_v, has_t = lse_v > -torch.inf, lse_t > -torch.inf
    # Where one side sees nothing its weight is 0; no infinity may enter the sigmoid's gradient.
    difference = lse_v.masked_fill(~has_v, 0.0) - lse_t.masked_fill(~has_t, 0.0)
    alpha = torch.sigmoid(difference)
    alpha = torch.where(has_v & has_t, alpha, has_v.to(alpha.dtype))[..., None]
    return alpha * out_v + (1 - alpha) * out_t


def _pad_rows(parts: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Concatenates the samples' rows and appends zero rows up to the padded count."""
    rows = torch.cat(parts) if parts else like.new_zeros((0, *like.shape[1:]))
    padding = rows.new_zeros((like.shape[0] - rows.shape[0], *like.shape[1:]))
    return torch.cat([rows, padding]).to(like.dtype)
