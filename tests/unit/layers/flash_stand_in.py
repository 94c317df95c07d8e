"""flash-attn's low-level functions with their real signatures, in plain float64 arithmetic.

flash-attn runs on a GPU only. What its adapter has to get right, the call and what goes in and
out, can be shown anywhere: these functions take the same arguments in the same order, fill the
same tensors, return the same things, and follow the documented meaning of windows (left and right
keys, -1 for none) and of causal (aligned to the last key).
Source: Dao-AILab/flash-attention, `flash_attn/flash_attn_interface.py` 2.7 to 2.8 and
`hopper/flash_attn_interface.py` of October 2025 and later.
"""

import types

import torch


def _visible(rows, keys, causal, left, right):
    distance = torch.arange(keys)[None, :] - (torch.arange(rows)[:, None] + keys - rows)
    right = 0 if causal else right
    visible = torch.ones(rows, keys, dtype=torch.bool)
    if left >= 0:
        visible &= distance >= -left
    if right >= 0:
        visible &= distance <= right
    return visible


def _pieces(cu_q, cu_k):
    assert cu_q.dtype == cu_k.dtype == torch.int32
    q, k = cu_q.tolist(), cu_k.tolist()
    for i in range(len(q) - 1):
        yield slice(q[i], q[i + 1]), slice(k[i], k[i + 1])


def _logits(q, k, scale, softcap):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * scale
    slope = torch.ones_like(logits)
    if softcap > 0:
        tanh = torch.tanh(logits / softcap)
        logits, slope = softcap * tanh, 1 - tanh**2
    return logits, slope


def _forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, left, right, softcap):
    lengths = [(b.stop - b.start, c.stop - c.start) for b, c in _pieces(cu_q, cu_k)]
    assert (max_q, max_k) == tuple(map(max, zip(*lengths, strict=True)))
    assert cu_q[-1] == len(q) and cu_k[-1] == len(k) == len(v)
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q), dtype=torch.float32)
    for rows, keys in _pieces(cu_q, cu_k):
        logits, _ = _logits(q[rows], k[keys], scale, softcap)
        visible = _visible(logits.shape[1], logits.shape[2], causal, left, right)
        logits = logits.masked_fill(~visible, -torch.inf)
        value = v[keys].repeat_interleave(q.shape[1] // v.shape[1], dim=1).double()
        out[rows] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), value).to(q.dtype)
        lse[:, rows] = torch.logsumexp(logits, -1).float()
    return out, lse


def _backward(grad, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, scale, causal, left, right, softcap):
    assert lse.shape == (q.shape[1], len(q)) and lse.is_contiguous() and lse.dtype == torch.float32
    repeat = q.shape[1] // k.shape[1]
    for rows, keys in _pieces(cu_q, cu_k):
        logits, slope = _logits(q[rows], k[keys], scale, softcap)
        visible = _visible(logits.shape[1], logits.shape[2], causal, left, right)
        weights = torch.exp(logits - lse[:, rows, None].double()).masked_fill(~visible, 0.0)
        d_out, value = grad[rows].double(), v[keys].repeat_interleave(repeat, dim=1).double()
        delta = (d_out * out[rows].double()).sum(-1).transpose(0, 1)[..., None]
        d_logits = weights * (torch.einsum("qhd,khd->hqk", d_out, value) - delta) * slope * scale
        key = k[keys].repeat_interleave(repeat, dim=1).double()
        dq[rows] = torch.einsum("hqk,khd->qhd", d_logits, key).to(q.dtype)

        def grouped(x, like):
            return x.unflatten(1, (-1, repeat)).sum(2).to(like.dtype)

        dk[keys] = grouped(torch.einsum("hqk,qhd->khd", d_logits, q[rows].double()), k)
        dv[keys] = grouped(torch.einsum("hqk,qhd->khd", weights, d_out), v)


def flash_attn_2():
    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None,
    ):  # fmt: skip
        assert dropout_p == 0.0
        out, lse = _forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
            causal, window_size_left, window_size_right, softcap,
        )  # fmt: skip
        return out, lse, torch.empty(0), torch.zeros(2, dtype=torch.int64)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert dropout_p == 0.0 and alibi_slopes is None and isinstance(deterministic, bool)
        _backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k,
            softmax_scale, causal, window_size_left, window_size_right, softcap,
        )  # fmt: skip
        return torch.empty(0)

    module = types.ModuleType("flash_attn.flash_attn_interface")
    module._flash_attn_varlen_forward = _flash_attn_varlen_forward
    module._flash_attn_varlen_backward = _flash_attn_varlen_backward
    return module


def flash_attn_3():
    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None,
        rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None,
        softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None,
        num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        out, lse = _forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
            causal, window_size_left, window_size_right, softcap,
        )  # fmt: skip
        return out, lse, torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None,
        sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None,
        softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert sequed_q is None and sequed_k is None and isinstance(deterministic, bool)
        _backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k,
            softmax_scale, is_causal, window_size_left, window_size_right, softcap,
        )  # fmt: skip
        return torch.empty(0)

    module = types.ModuleType("flash_attn_interface")
    module._flash_attn_forward = _flash_attn_forward
    module._flash_attn_backward = _flash_attn_backward
    return module
