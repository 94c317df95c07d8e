"""The oracle: decomposed attention written plainly, sample by sample, in any floating dtype.

It follows section 3 of arXiv 2502.01906 literally: two softmaxes, each with its log-sum-exp, and
alpha = sigmoid(lse_V - lse_T). It keeps whole score matrices and is differentiated by autograd.
"""

from __future__ import annotations

import torch

from dattn_mcore.layers.attention.options import AttentionOptions
from dattn_mcore.layers.attention.rotary import Rotary, rotate
from dattn_mcore.layers.layout import DecomposedSeqParams


def reference_attention(
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
    q_rotated, k_text_rotated = rotate(q, rotary.text), rotate(k_text, rotary.text)
    q_to_visual, k_for_text = q, k_visual
    if not options.debiased:
        q_to_visual, k_for_text = q_rotated, rotate(k_visual, rotary.visual)
    text_parts, visual_parts = [], []
    reading_visual = params.reading_positions[: params.num_visual]
    reading_text = params.reading_positions[params.num_visual :]
    text_offsets, visual_offsets = params.text_offsets, params.visual_offsets
    for i in range(len(params.text_lengths)):
        t = slice(text_offsets[i], text_offsets[i + 1])
        v = slice(visual_offsets[i], visual_offsets[i + 1])
        read_t, read_v = reading_text[t], reading_visual[v]
        distance_v = read_t[:, None] - read_v[None, :]
        distance_t = params.text_positions[t][:, None] - params.text_positions[t][None, :]
        sees_v, sees_t = distance_v > 0, distance_t >= 0
        if options.window is not None:
            sees_t = sees_t & (distance_t < options.window)
            if not options.debiased:
                sees_v = sees_v & (distance_v < options.window)
        part_v = _softmax_part(q_to_visual[t], k_for_text[v], v_visual[v], sees_v, options)
        part_t = _softmax_part(q_rotated[t], k_text_rotated[t], v_text[t], sees_t, options)
        text_parts.append(_merge(part_v, part_t, options.merge))
        if q_visual is not None:
            visual_parts.append(
                _causal_visual(
                    rotate(q_visual[v], rotary.visual[v]),
                    rotate(k_visual[v], rotary.visual[v]),
                    v_visual[v],
                    k_text_rotated[t],
                    v_text[t],
                    params.visual_positions[v],
                    params.text_positions[t],
                    options,
                )
            )
    text = _pad_rows(text_parts, q)
    return text, None if q_visual is None else _pad_rows(visual_parts, q_visual)


def _causal_visual(
    q: torch.Tensor,
    k_visual: torch.Tensor,
    v_visual: torch.Tensor,
    k_text: torch.Tensor,
    v_text: torch.Tensor,
    visual_positions: torch.Tensor,
    text_positions: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    """Visual rows of one sample as causal queries; text keys only on a common position axis."""
    to_visual = visual_positions[:, None] - visual_positions[None, :]
    to_text = visual_positions[:, None] - text_positions[None, :]
    sees_v = to_visual >= 0
    sees_t = to_text > 0 if not options.debiased else torch.zeros_like(to_text, dtype=torch.bool)
    if options.window is not None:
        sees_v, sees_t = sees_v & (to_visual < options.window), sees_t & (to_text < options.window)
    return _merge(
        _softmax_part(q, k_visual, v_visual, sees_v, options),
        _softmax_part(q, k_text, v_text, sees_t, options),
        "alpha",
    )


def _softmax_part(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over one set of keys, and its log-sum-exp.

    q is [rows, heads, head_dim]; k and v [keys, groups, head_dim]; visible bool [rows, keys].

    Returns:
        output [rows, heads, head_dim], zero where nothing is visible; lse [rows, heads], minus
        infinity there. Computed in at least float32.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    logits = torch.einsum("qhd,khd->qhk", q.to(compute), k.to(compute)) * options.scale
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
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


def _merge(
    visual: tuple[torch.Tensor, torch.Tensor], text: tuple[torch.Tensor, torch.Tensor], rule: str
) -> torch.Tensor:
    """Joins the parts over visual and over text keys: alpha weights, or their plain sum."""
    (out_v, lse_v), (out_t, lse_t) = visual, text
    if rule == "sum":
        return out_v + out_t
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
