"""Decomposed attention on PyTorch's flash kernels (CPU and GPU), linear memory in the visual rows.

`merge` says how calls over visual and over text keys become one exact softmax.

Rows of a pack are batched (`sdpa_batches`): text rows causally; text by visual rows as dense
rectangles, with the query heads of a group folded into the query rows. So no mask and no score
matrix of text by visual rows exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dattn_mcore.layers.attention.calls import PartByCalls, attend_by_calls
from dattn_mcore.layers.attention.inputs import AttentionInputs
from dattn_mcore.layers.attention.merge import Passes
from dattn_mcore.layers.attention.modes import Causal, InBlocks, InChunks, KeySet
from dattn_mcore.layers.attention.options import AttentionOptions
from dattn_mcore.layers.attention.rows import sample_rectangles
from dattn_mcore.layers.attention.sdpa_batches import (
    Batch,
    block_batches,
    causal_batches,
    cut_chunks,
)
from dattn_mcore.layers.blocks import Block
from dattn_mcore.layers.layout import DecomposedSeqParams

_NEVER = 1e30  # log-sum-exp of padding queries: exp(logit - _NEVER) is zero, without infinities
_aten = torch.ops.aten


@dataclass(frozen=True)
class SdpaBackend:
    """See the module."""

    name: str = "sdpa"
    needs_gpu: bool = False

    def refuses(
        self, options: AttentionOptions, device_type: str, dtype: torch.dtype, head_dim: int
    ) -> str | None:
        """See `Backend`."""
        if options.softcap is not None:
            return "it computes no attention soft-caps (model.llm.attention_softcap)"
        if options.window_skips_positions:
            return "it has no sliding window between text and visual rows in this mixed mode"
        if device_type not in ("cpu", "meta"):
            if options.window is not None:
                return "it has no sliding windows on a GPU"
            if dtype not in (torch.float16, torch.bfloat16):
                return f"it computes bf16 and fp16 on a GPU, not {dtype} (train.precision)"
        return None

    def describe(self, head_dim: int) -> str:
        """See `Backend`."""
        return "PyTorch's flash kernels compute this model"

    def attend(
        self, inputs: AttentionInputs, options: AttentionOptions
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend`."""
        return attend_by_calls(inputs, options, _passes)

    def part(
        self,
        key_set: KeySet,
        params: DecomposedSeqParams,
        options: AttentionOptions,
        device: torch.device,
    ) -> PartByCalls:
        """See `Backend`."""
        return PartByCalls(_passes(key_set, params, options, device))


BACKEND = SdpaBackend()


def _passes(
    key_set: KeySet, params: DecomposedSeqParams, options: AttentionOptions, device: torch.device
) -> Passes:
    """See `calls.MakePasses`."""
    sees = key_set.sees
    window = None if isinstance(sees, InBlocks) else sees.window
    key = ("sdpa", *key_set.key, window if isinstance(sees, InChunks) else None)
    if key not in params.cache:
        params.cache[key] = _batches(sees, device)
    return [
        [_BatchCall(batch, causal, options.scale, window) for batch in batches]
        for batches, causal in params.cache[key]
    ]


def _batches(
    sees: Causal | InBlocks | InChunks, device: torch.device
) -> list[tuple[list[Batch], bool]]:
    """Passes of batches, and whether each is causal."""
    if isinstance(sees, InBlocks):
        return [(batches, False) for batches in block_batches(sees.blocks, device)]
    before: tuple[Block, ...] = ()
    if isinstance(sees, Causal):
        samples = sample_rectangles(sees.lengths)
    else:
        before, samples = cut_chunks(sees)
    causal = causal_batches(samples, device)
    passes = [(causal, True)] if causal else []
    return passes + [(batches, False) for batches in block_batches(before, device)]


def _flash_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
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
    *,
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


class _BatchCall:
    """One call of the kernel on a batch; see `merge.KernelCall`."""

    def __init__(self, batch: Batch, causal: bool, scale: float, window: int | None):
        self.batch, self.causal, self.scale, self.window = batch, causal, scale, window
        self.q_rows, self.k_rows = batch.q_rows, batch.k_rows

    def _queries(self, rows: torch.Tensor, groups: int, fill: float = 0.0) -> torch.Tensor:
        """[rows, heads, d] -> [batch, heads, q, d]; dense calls fold a group's heads into q."""
        x = self.batch.padded(rows, fill)  # [b, q, heads, d]
        if self.causal:
            return x.transpose(1, 2)
        b, n, heads, d = x.shape
        x = x.unflatten(2, (groups, heads // groups)).permute(0, 2, 3, 1, 4)
        return x.reshape(b, groups, heads // groups * n, d)

    def _rows(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        """Inverse of `_queries`: [rows, heads, d]."""
        if not self.causal:
            b, groups, folded, d = x.shape
            x = x.view(b, groups, heads // groups, folded * groups // heads, d)
            x = x.reshape(b, heads, -1, d)
        return self.batch.unpadded(x.transpose(1, 2))

    def _keys(self, rows: torch.Tensor, heads: int) -> torch.Tensor:
        """[rows, groups, d] -> [batch, groups, k, d], one head a query head in causal calls."""
        if not self.causal:
            return rows.unflatten(0, (self.batch.size, -1)).transpose(1, 2)
        x = self.batch.padded(rows).transpose(1, 2)
        return x.repeat_interleave(heads // x.shape[1], dim=1) if heads != x.shape[1] else x

    def _key_rows(self, x: torch.Tensor, groups: int) -> torch.Tensor:
        """Inverse of `_keys`, summed over the heads of a group."""
        if not self.causal:
            return x.transpose(1, 2).flatten(0, 1)
        if x.shape[1] != groups:
            x = x.unflatten(1, (groups, -1)).sum(2)
        return self.batch.unpadded(x.transpose(1, 2))

    def _mask(self, like: torch.Tensor) -> torch.Tensor | None:
        return _window_mask(self.batch.queries, self.window, like) if self.causal else None

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        heads, groups = q.shape[1], k.shape[1]
        mask = self._mask(q)
        out, lse, state = _flash_forward(
            self._queries(q, groups),
            self._keys(k, heads),
            self._keys(v, heads),
            causal=self.causal and mask is None,
            scale=self.scale,
            mask=mask,
        )
        return self._rows(out, heads), self._rows(lse[..., None], heads)[..., 0], state

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
        heads, groups = q.shape[1], k.shape[1]
        mask = self._mask(q)
        dq, dk, dv = _flash_backward(
            self._queries(grad, groups).contiguous(),
            q=self._queries(q, groups),
            k=self._keys(k, heads),
            v=self._keys(v, heads),
            out=self._queries(out, groups),
            lse=self._queries(lse[..., None], groups, _NEVER)[..., 0].contiguous(),
            causal=self.causal and mask is None,
            scale=self.scale,
            mask=mask,
            state=state,
        )
        return self._rows(dq, heads), self._key_rows(dk, groups), self._key_rows(dv, groups)
