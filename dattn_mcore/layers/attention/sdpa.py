"""Decomposed attention on PyTorch's flash kernels (CPU and GPU), linear memory in the visual rows.

`parts` says how the parts over visual and over text keys become one exact softmax.

Samples of a pack are batched: text rows causally, padded to the longest of a bucket; text-to-visual
as dense blocks, grouped by their number of visual rows, with the query heads of a group folded
into the query rows. So no mask and no score matrix of text by visual rows exists.
"""

from __future__ import annotations

from typing import Any

import torch

from dattn_mcore.layers.attention.options import AttentionOptions
from dattn_mcore.layers.attention.parts import attend_in_parts
from dattn_mcore.layers.attention.rotary import Rotary
from dattn_mcore.layers.attention.sdpa_batches import Batch, block_batches, causal_batches
from dattn_mcore.layers.layout import DecomposedSeqParams

_NEVER = 1e30  # log-sum-exp of padding queries: exp(logit - _NEVER) is zero, without infinities
_aten = torch.ops.aten


def sdpa_refuses(options: AttentionOptions, device_type: str, dtype: torch.dtype) -> str | None:
    """Why the flash kernels cannot compute this; None if they can."""
    if options.softcap is not None:
        return "it computes no attention soft-caps (model.llm.attention_softcap)"
    if options.window is not None and not options.debiased and not options.is_baseline:
        return "it has no sliding window between text and visual rows in this mixed mode"
    if device_type != "cpu":
        if options.window is not None:
            return "it has no sliding windows on a GPU"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"it computes bf16 and fp16 on a GPU, not {dtype} (train.precision)"
    return None


def sdpa_attention(
    q: torch.Tensor,
    k_text: torch.Tensor,
    v_text: torch.Tensor,
    k_visual: torch.Tensor,
    v_visual: torch.Tensor,
    q_visual: torch.Tensor | None,
    rotary: Rotary,
    params: DecomposedSeqParams,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `layers.attention` for shapes."""
    return attend_in_parts(
        *(q, k_text, v_text, k_visual, v_visual, q_visual, rotary, params, options, _Parts)
    )


def _flash_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Flash attention of [batch, heads, rows, head_dim]; output, lse [batch, heads, rows], rest."""
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
        return out, lse, None
    out, lse, _, _, max_q, max_k, seed, offset, _ = _aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, causal, False, scale=scale
    )
    return out, lse, (max_q, max_k, seed, offset)


def _flash_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
    mask: torch.Tensor | None,
    state: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
    max_q, max_k, seed, offset = state
    return _aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, None, None, max_q, max_k, 0.0, causal, seed, offset, scale=scale
    )


def _window_mask(rows: int, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
    """Additive causal mask [rows, rows] where a window cuts something off; None elsewhere."""
    if window is None or rows <= window:
        return None
    position = torch.arange(rows, device=like.device)
    distance = position[:, None] - position[None, :]
    mask = torch.zeros((rows, rows), dtype=like.dtype, device=like.device)
    return mask.masked_fill((distance < 0) | (distance >= window), -torch.inf)


class _Part:
    """One set of keys: gathers the rows of a batch, runs the kernel, scatters the results."""

    def __init__(self, batches: list[Batch], causal: bool, scale: float, window: int | None):
        self.batches, self.causal, self.scale, self.window = batches, causal, scale, window

    def _queries(self, rows: torch.Tensor, batch: Batch, groups: int) -> torch.Tensor:
        """[rows, heads, d] -> [batch, heads, q, d]; dense parts fold a group's heads into q."""
        x = rows[batch.q_index]  # [b, q, heads, d]
        if self.causal:
            return x.transpose(1, 2)
        b, n, heads, d = x.shape
        x = x.view(b, n, groups, heads // groups, d).permute(0, 2, 3, 1, 4)
        return x.reshape(b, groups, heads // groups * n, d)

    def _rows(self, x: torch.Tensor, batch: Batch, heads: int) -> torch.Tensor:
        """Inverse of `_queries` without padding: [valid rows, heads, d]."""
        if not self.causal:
            b, groups, folded, d = x.shape
            x = x.view(b, groups, heads // groups, folded * groups // heads, d)
            x = x.reshape(b, heads, -1, d)
        x = x.transpose(1, 2)
        return x.reshape(-1, *x.shape[2:]) if batch.valid is None else x[batch.valid]

    def _keys(self, rows: torch.Tensor, batch: Batch, heads: int) -> torch.Tensor:
        x = rows[batch.k_index].transpose(1, 2)
        if self.causal and heads != x.shape[1]:
            x = x.repeat_interleave(heads // x.shape[1], dim=1)
        return x

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
        """Output [rows, heads, d], lse [rows, heads] (minus infinity where nothing is seen)."""
        heads, groups = q.shape[1], k.shape[1]
        out = torch.zeros_like(q)
        lse = torch.full(
            q.shape[:2], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32)
        ).to(q.device)
        states = []
        for batch in self.batches:
            mask = _window_mask(batch.q_index.shape[1], self.window, q) if self.causal else None
            queries = self._queries(q, batch, groups)
            o, s, state = _flash_forward(
                queries,
                self._keys(k, batch, heads),
                self._keys(v, batch, heads),
                self.causal and mask is None,
                self.scale,
                mask,
            )
            out[batch.q_rows] = self._rows(o, batch, heads)
            lse[batch.q_rows] = self._rows(s[..., None], batch, heads)[..., 0].to(lse.dtype)
            states.append(state)
        return out, lse, states

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        states: list[Any],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q, k, v for a given (merged) output and log-sum-exp."""
        heads, groups = q.shape[1], k.shape[1]
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for batch, state in zip(self.batches, states, strict=True):
            mask = _window_mask(batch.q_index.shape[1], self.window, q) if self.causal else None
            g, s = grad, lse
            d_out = self._queries(g, batch, groups)
            logsum = self._queries(s[..., None], batch, groups)[..., 0]
            if batch.valid is not None:
                valid = batch.valid[:, :, None, None].expand(-1, -1, heads, 1)
                valid = self._fold_valid(valid, groups)
                d_out = d_out.masked_fill(~valid, 0.0)
                logsum = logsum.masked_fill(~valid[..., 0], _NEVER)
            dqb, dkb, dvb = _flash_backward(
                d_out.contiguous(),
                self._queries(q, batch, groups),
                self._keys(k, batch, heads),
                self._keys(v, batch, heads),
                self._queries(out, batch, groups),
                logsum.contiguous(),
                self.causal and mask is None,
                self.scale,
                mask,
                state,
            )
            dq[batch.q_rows] = self._rows(dqb, batch, heads)
            dk.index_add_(0, batch.k_index.flatten(), self._key_rows(dkb, groups))
            dv.index_add_(0, batch.k_index.flatten(), self._key_rows(dvb, groups))
        return dq, dk, dv

    def _fold_valid(self, valid: torch.Tensor, groups: int) -> torch.Tensor:
        """[b, q, heads, 1] -> the layout of `_queries`."""
        if self.causal:
            return valid.transpose(1, 2)
        b, n, heads, _ = valid.shape
        valid = valid.reshape(b, n, groups, heads // groups, 1).permute(0, 2, 3, 1, 4)
        return valid.reshape(b, groups, heads // groups * n, 1)

    def _key_rows(self, x: torch.Tensor, groups: int) -> torch.Tensor:
        """[b, heads, k, d] -> [b * k, groups, d], summed over the heads of a group."""
        b, heads, n, d = x.shape
        if heads != groups:
            x = x.view(b, groups, heads // groups, n, d).sum(2)
        return x.transpose(1, 2).reshape(b * n, groups, d)


class _Parts:
    """The parts of a pack on PyTorch's kernels; see `parts.Parts`."""

    @staticmethod
    def causal(
        params: DecomposedSeqParams,
        name: str,
        lengths: tuple[int, ...],
        options: AttentionOptions,
        device: torch.device,
    ) -> _Part:
        batches = causal_batches(params, name, lengths, device)
        return _Part(batches, True, options.scale, options.window)

    @staticmethod
    def blocks(
        params: DecomposedSeqParams, options: AttentionOptions, device: torch.device
    ) -> _Part:
        return _Part(block_batches(params, device), False, options.scale, None)
