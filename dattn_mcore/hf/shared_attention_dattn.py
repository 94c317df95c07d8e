"""Attention of a batch's text rows to images of which there is one copy for all samples.

The text rows of all samples that show a list of images are the queries of one product with that
list's keys. Each part gives its own softmax and log-sum-exp, and the two are merged exactly:
a * XA + (1 - a) * SA with a = sigmoid(lse_V - lse_T); or added, where the model's merge is `sum`.

Source: Kuo et al., "D-Attn: Decomposed Attention for Large Vision-and-Language Models"
(arXiv 2502.01906).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout_dattn import Readers
from .shared_images_dattn import SharedImages

# Scores that are in memory at once: as many as a processor's cache holds; on an accelerator enough
# to fill it.
CPU_SCORES, ACCELERATOR_SCORES = 2**19, 2**26


def attend_shared(
    query: Tensor,
    text: tuple[Tensor, Tensor, Tensor, Tensor],
    shared: SharedImages,
    readers: Sequence[Readers],
    layer: int,
    scale: float,
    softcap: float | None,
    merge: str,
) -> Tensor:
    """Attention over each sample's text and its images.

    Args:
        query: without positions [batch, heads, queries, head_dim], for images.
        text: rotated queries, keys, values and visibility of the text, see `part`.
        shared: the images.
        readers: which queries read which list of them.
        layer: whose keys and values.
        scale: factor of the logits.
        softcap: logits become softcap * tanh(logits / softcap); None: not capped.
        merge: `alpha` or `sum`.

    Returns:
        [batch, queries, heads * head_dim].
    """
    rotated, key, value, visible = text
    batch, heads, queries, width = query.shape
    output, lse = part(rotated, key, value, visible, scale, softcap)
    output = output.transpose(1, 2).reshape(batch * queries, heads, width)
    if readers:
        by_row = query.transpose(1, 2).reshape(batch * queries, heads, width)
        seen, lse_seen = [], []
        for reader in readers:
            images = shared.lists[reader.number].rows
            assert images is not None
            found = part(
                by_row[reader.rows].transpose(0, 1)[None],
                images.keys[layer].transpose(0, 1)[None],
                images.values[layer].transpose(0, 1)[None],
                reader.visible,
                scale,
                softcap,
            )
            seen.append(found[0][0])
            lse_seen.append(found[1][0])
        rows = torch.cat([reader.rows for reader in readers])
        visual = torch.cat(seen, dim=1).transpose(0, 1)
        if merge == "sum":
            output = output.index_add(0, rows, visual)
        else:
            lse = lse.transpose(1, 2).reshape(batch * queries, heads, 1)
            share = torch.sigmoid(torch.cat(lse_seen, dim=1).transpose(0, 1) - lse[rows])
            output = output.index_copy(0, rows, torch.lerp(output[rows], visual, share))
    return output.to(query.dtype).view(batch, queries, heads * width)


def part(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The softmax over one set of keys, of which each query sees one at least.

    A block of queries at a time, which bounds the memory of its scores.

    Args:
        query: [batch, heads, queries, head_dim].
        key: [batch, kv heads, keys, head_dim]; value likewise.
        visible: bool [batch, 1, queries, keys]; None: all are seen.
        scale: factor of the logits.
        softcap: logits become softcap * tanh(logits / softcap); None: not capped.

    Returns:
        Output [batch, heads, queries, head_dim] and log-sum-exp [batch, heads, queries, 1], in at
        least float32.
    """
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    most = CPU_SCORES if query.is_cpu else ACCELERATOR_SCORES
    block = max(1, most // (batch * heads * keys))
    outputs, lses = [], []
    for begin in range(0, queries, block):
        some = query[:, :, begin : begin + block]
        shape = (batch, heads, some.shape[2])
        # The heads of a group become rows.
        logits = products(some.reshape(batch, groups, -1, width), key, scale)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if visible is not None:
            hidden = ~visible[:, :, begin : begin + block]
            lowest = torch.finfo(logits.dtype).min
            logits = logits.view(*shape, keys).masked_fill(hidden, lowest).view_as(logits)
        # The largest logit and its weight give the log-sum-exp. PyTorch's softmax is fast where
        # keys are hidden; its exp is not, of numbers that become 0.
        weights = torch.softmax(logits, dim=-1)
        lse = logits.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()
        output = (weights.to(value.dtype) @ value).to(wide)
        outputs.append(output.view(*shape, width))
        lses.append(lse.view(*shape, 1))
    if len(outputs) == 1:
        return outputs[0], lses[0]
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)


def products(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Scaled dot products of queries and keys, in at least float32.

    Narrow ones are not rounded before the softmax, as PyTorch's attention does not round them: an
    answer must not depend on which of the two computes it.

    Args:
        query: [batch, kv heads, rows, head_dim].
        key: [batch, kv heads, keys, head_dim].
        scale: what they are multiplied by.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    return (query.to(wide) * scale) @ key.to(wide).transpose(2, 3)


__all__ = ["attend_shared", "part", "products"]
