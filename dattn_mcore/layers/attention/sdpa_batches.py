"""Which rows of a pack form one call of PyTorch's dense kernels.

Text rows go causally, padded to the longest of a bucket; text-to-visual as dense blocks, grouped by
their number of visual rows. Index tensors are kept with the pack.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dattn_mcore.layers.layout import DecomposedSeqParams


@dataclass(frozen=True)
class Batch:
    """Rows of one kernel call.

    Attributes:
        q_index: int64 [batch, q_rows], row of each query; 0 where padded.
        k_index: int64 [batch, k_rows].
        valid: bool [batch, q_rows], None where nothing is padded.
        q_rows: int64 [valid queries], q_index without padding.
    """

    q_index: torch.Tensor
    k_index: torch.Tensor
    valid: torch.Tensor | None
    q_rows: torch.Tensor


def _make_batch(spans: list[tuple[int, int, int, int]], device: torch.device) -> Batch:
    """A batch from (q_start, q_length, k_start, k_length) spans of equal k_length."""
    longest = max(length for _, length, _, _ in spans)
    q_index = np.zeros((len(spans), longest), dtype=np.int64)
    valid = np.zeros((len(spans), longest), dtype=bool)
    for row, (start, length, _, _) in enumerate(spans):
        q_index[row, :length] = np.arange(start, start + length)
        valid[row, :length] = True
    k_index = np.stack([np.arange(start, start + length) for _, _, start, length in spans])
    return Batch(
        q_index=torch.from_numpy(q_index).to(device),
        k_index=torch.from_numpy(k_index).to(device),
        valid=None if valid.all() else torch.from_numpy(valid).to(device),
        q_rows=torch.from_numpy(q_index[valid]).to(device),
    )


def causal_batches(
    params: DecomposedSeqParams, name: str, lengths: tuple[int, ...], device: torch.device
) -> list[Batch]:
    """Samples bucketed by length (powers of two), so that padding at most doubles the rows."""
    if name not in params.cache:
        buckets: dict[int, list[tuple[int, int]]] = {}
        start = 0
        for length in lengths:
            if length:
                buckets.setdefault(max(16, 1 << (length - 1).bit_length()), []).append(
                    (start, length)
                )
            start += length
        batches = []
        for spans in buckets.values():
            batch = _make_batch([(start, length, 0, 0) for start, length in spans], device)
            batches.append(Batch(batch.q_index, batch.q_index, batch.valid, batch.q_rows))
        params.cache[name] = batches
    return params.cache[name]


def block_batches(params: DecomposedSeqParams, device: torch.device) -> list[Batch]:
    """Text-to-visual blocks, grouped by their number of visual rows."""
    if "blocks" not in params.cache:
        groups: dict[int, list[tuple[int, int, int, int]]] = {}
        for block in params.blocks:
            k_length = block.visual_stop - block.visual_start
            span = (
                block.text_start,
                block.text_stop - block.text_start,
                block.visual_start,
                k_length,
            )
            groups.setdefault(k_length, []).append(span)
        params.cache["blocks"] = [_make_batch(spans, device) for spans in groups.values()]
    return params.cache["blocks"]
