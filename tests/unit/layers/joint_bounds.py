"""How far the joint kernel may be from exact arithmetic: a running error bound, element by element.

Everything is computed densely in float64 from the same (already rounded) inputs, once as it is and
once with absolute values, which gives first-order bounds of what rounding can do (Higham, Accuracy
and Stability of Numerical Algorithms, 3.1). `eps` is that of the inputs' dtype, `tiny` that of
float32, in which everything is added up. Nothing is fitted to what the kernel happens to return:

- text logits meet factors that were rotated and rounded: 2 eps each pair; visual logits only sums;
- a capped logit costs a few float32 roundings of its cap;
- weights inherit twice the logits' error, once of their own and once of the normaliser;
- weights and logit gradients are rounded to the dtype before the second product;
- results are rounded to the dtype once.

Where nothing is seen, the bound is zero: the result must be exactly zero.
"""

from dataclasses import dataclass

import torch

from dattn_mcore.layers.attention.rotary import rotate


@dataclass
class Dense:
    """Exact log-sum-exps [T, heads], outputs and gradients of text rows, with bounds for each."""

    lse: torch.Tensor
    values: dict[str, torch.Tensor]
    bounds: dict[str, torch.Tensor]
    lse_bound: torch.Tensor


def samples_and_reading(params):
    """int64 [V + T] each: a row's sample, -1 on padding, and its index in the sample."""
    sample = torch.full((params.num_visual + params.num_text,), -1, dtype=torch.int64)
    reading = torch.zeros_like(sample)
    lengths = [v + t for v, t in zip(params.visual_lengths, params.text_lengths, strict=True)]
    for index, rows in enumerate(params.reading_order.cpu().split(lengths)):
        sample[rows] = index
        reading[rows] = torch.arange(len(rows))
    return sample, reading


def visibility(params, window):
    """bool [T, V] and [T, T], from samples and reading positions alone."""
    v = params.num_visual
    sample, reading = samples_and_reading(params)
    real = (sample[v:, None] >= 0) & (sample[v:, None] == sample[None, :])
    sees = real & (reading[v:, None] >= reading[None, :])
    text = params.text_positions
    if window is not None:
        near = text[:, None] - text[None, :] < window
        sees[:, v:] &= near
    return sees


def dense(inputs, d_out, angles, params, options, eps, factor=None):
    """See the module; inputs are q, k_text, v_text, k_visual, v_visual in float64.

    A factor [T, 1, 1, 1] multiplies rotated queries.
    """
    q, k_text, v_text, k_visual, v_visual = (x.detach() for x in inputs)
    tiny = torch.finfo(torch.float32).eps
    heads, groups, dim, split = q.shape[1], k_text.shape[1], q.shape[2], k_visual.shape[0]
    repeat = heads // groups
    q_turned, k_turned = rotate(q, angles, factor), rotate(k_text, angles)
    times = 1.0 if factor is None else factor[:, 0]

    def grouped(visual, text):
        return torch.cat([visual, text]).repeat_interleave(repeat, dim=1)

    keys, values = grouped(k_visual, k_turned), grouped(v_visual, v_text)
    sees = visibility(params, options.window)[:, None, :]

    def products(a, a_turned, b, absolute):
        f = torch.abs if absolute else (lambda x: x)
        visual = torch.einsum("thd,khd->thk", f(a), f(b[:split]))
        return torch.cat([visual, torch.einsum("thd,khd->thk", f(a_turned), f(b[split:]))], dim=-1)

    size = products(q, q_turned, keys, True) * options.scale
    rounded = torch.zeros_like(size)
    rounded[..., split:] = 2 * eps
    logit_error = size * (rounded + (dim + 8) * tiny)
    logits = products(q, q_turned, keys, False) * options.scale
    slope = torch.ones_like(logits)
    slope_error = torch.zeros_like(logits)
    if options.softcap is not None:
        t = torch.tanh(logits / options.softcap)
        logits, slope = options.softcap * t, 1 - t**2
        slope_error = 2 * logit_error / options.softcap + 4 * tiny
        logit_error = logit_error + 4 * options.softcap * tiny
    count = sees.sum(-1)
    lse = torch.logsumexp(logits.masked_fill(~sees, -torch.inf), -1)
    weights = torch.exp(logits - lse[..., None]).masked_fill(~sees, 0.0)
    weights = weights.nan_to_num(0.0)
    worst = logit_error.masked_fill(~sees, 0.0).amax(-1, keepdim=True)
    sums = (count + 16)[..., None] * tiny
    weight_error = 2 * worst + sums + 4 * tiny * lse.abs().nan_to_num(posinf=0.0)[..., None]

    out = torch.einsum("thk,khd->thd", weights, values)
    out_error = torch.einsum("thk,khd->thd", weights * (weight_error + eps), values.abs())
    out_error = out_error + eps * out.abs()
    delta = (out * d_out).sum(-1, keepdim=True)
    delta_error = (out_error * d_out.abs()).sum(-1, keepdim=True)
    delta_error = delta_error + dim * tiny * (out * d_out).abs().sum(-1, keepdim=True)
    d_weights = torch.einsum("thd,khd->thk", d_out, values)
    d_weights_error = dim * tiny * torch.einsum("thd,khd->thk", d_out.abs(), values.abs())
    difference = d_weights - delta
    d_logits = weights * difference * slope
    size = weights * (d_weights.abs() + delta.abs())
    d_logits_error = size * (weight_error + slope_error + 4 * tiny) + eps * d_logits.abs()
    d_logits_error = d_logits_error + weights * (d_weights_error + delta_error)

    def to_queries(x, absolute=False):
        f = torch.abs if absolute else (lambda y: y)
        visual = torch.einsum("thk,khd->thd", x[..., :split], f(keys[:split]))
        text = torch.einsum("thk,khd->thd", x[..., split:], f(keys[split:]))
        return visual * options.scale, text * options.scale

    def to_keys(x, source, turned):
        def summed(y):
            return y.view(y.shape[0], groups, repeat, dim).sum(2)

        visual = summed(torch.einsum("thk,thd->khd", x[..., :split], source))
        text = summed(torch.einsum("thk,thd->khd", x[..., split:], turned))
        return visual * options.scale, text * options.scale

    def unrotated_bound(x):
        # Turning back mixes a column with its partner, by factors of at most one each.
        return x + x.roll(dim // 2, dims=-1)

    d_q_visual, d_q_text = to_queries(d_logits)
    d_q = d_q_visual + rotate(d_q_text, -angles, factor)
    eq_visual, eq_text = to_queries(d_logits_error + 16 * tiny * d_logits.abs(), True)
    _, q_key_rounding = to_queries(eps * d_logits.abs(), True)
    d_q_error = eq_visual + unrotated_bound(eq_text + q_key_rounding) * times + eps * d_q.abs()

    d_k_visual, d_k_turned = to_keys(d_logits, q, q_turned)
    d_k_text = rotate(d_k_turned, -angles)
    ek_visual, ek_text = to_keys(
        d_logits_error + 16 * tiny * d_logits.abs(), q.abs(), q_turned.abs()
    )
    _, k_query_rounding = to_keys(eps * d_logits.abs(), q.abs(), q_turned.abs())
    ek_visual = ek_visual + eps * d_k_visual.abs()
    # Rounded once in the rotated frame and once at the end.
    ek_text = unrotated_bound(ek_text + k_query_rounding + eps * d_k_turned.abs())
    ek_text = ek_text + eps * d_k_text.abs()

    def to_values(x, source):
        return torch.einsum("thk,thd->khd", x, source).view(-1, groups, repeat, dim).sum(2)

    d_v = to_values(weights, d_out)
    d_v_error = to_values(weights * (weight_error + eps + 16 * tiny), d_out.abs())
    d_v_error = d_v_error + eps * d_v.abs()
    return Dense(
        lse=lse,
        lse_bound=worst[..., 0] + sums[..., 0] + 4 * tiny * lse.abs().nan_to_num(posinf=0.0),
        values={
            "out": out,
            "q": d_q,
            "k_text": d_k_text,
            "v_text": d_v[split:],
            "k_visual": d_k_visual,
            "v_visual": d_v[:split],
        },
        bounds={
            "out": out_error,
            "q": d_q_error,
            "k_text": ek_text,
            "v_text": d_v_error[split:],
            "k_visual": ek_visual,
            "v_visual": d_v_error[:split],
        },
    )
