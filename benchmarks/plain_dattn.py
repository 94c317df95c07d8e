"""D-Attn (arXiv 2502.01906) in plain lines of PyTorch: one sample at a time, no packing.

Written from the paper's equations, to hold the trainer against (`benchmarks.same_curve`). Nothing
of `dattn_mcore` is imported. Weights are a dictionary; its names are those of an exported folder,
so that both sides can start from the same file. Tower: SigLIP. Language model: Mistral.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TOWER, PROJECTOR = "model.vision_tower", "model.multi_modal_projector"
LLM = "model.language_model"
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """What the shapes of the weights do not say."""

    layers: int
    heads: int
    head_dim: int
    tower_layers: int
    tower_heads: int
    patch: int  # pixels along one side
    norm_eps: float = 1e-5
    tower_eps: float = 1e-6
    projector_eps: float = 1e-6
    rotary_base: float = 10000.0


def logits(w: Weights, s: Sizes, ids: Tensor, images: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Logits [text rows, vocabulary] of one sample.

    Args:
        w: weights.
        s: sizes.
        ids: int64 [text rows].
        images: for each image how many text rows stand before it, and its pixels [3, side, side].
    """
    text = F.embedding(ids, w[f"{LLM}.embed_tokens.weight"])
    rows = [projector(w, s, tower(w, s, pixels)) for _, pixels in images]
    visual = torch.cat([text[:0], *rows])
    before = [place for (place, _), image in zip(images, rows, strict=True) for _ in image]
    # Text row i sees the visual rows of images that stand before it.
    seen = torch.arange(len(ids))[:, None] >= torch.tensor(before, dtype=torch.int64)[None]
    for layer in range(s.layers):
        visual, text = decoder_layer(w, f"{LLM}.layers.{layer}", s, visual, text, seen)
    return linear(w, "lm_head", rms_norm(text, w[f"{LLM}.norm.weight"], s.norm_eps))


def decoder_layer(
    w: Weights, name: str, s: Sizes, visual: Tensor, text: Tensor, seen: Tensor
) -> tuple[Tensor, Tensor]:
    """Norms, residuals and MLP are the language model's own, for rows of both kinds."""
    norms = [w[f"{name}.{norm}.weight"] for norm in ("input_layernorm", "post_attention_layernorm")]
    rows = torch.cat([visual, text])
    inputs = rms_norm(rows, norms[0], s.norm_eps).split([len(visual), len(text)])
    rows = rows + torch.cat(attention(w, f"{name}.self_attn", s, *inputs, seen))
    x = rms_norm(rows, norms[1], s.norm_eps)
    x = F.silu(linear(w, f"{name}.mlp.gate_proj", x)) * linear(w, f"{name}.mlp.up_proj", x)
    rows = rows + linear(w, f"{name}.mlp.down_proj", x)
    return rows[: len(visual)], rows[len(visual) :]


def attention(
    w: Weights, name: str, s: Sizes, visual: Tensor, text: Tensor, seen: Tensor
) -> tuple[Tensor, Tensor]:
    """V2V diagonal, T2V without positions, T2T causal; the last two merged by alpha."""

    def heads(part: str, x: Tensor) -> Tensor:
        y = linear(w, f"{name}.{part}_proj", x).unflatten(1, (-1, s.head_dim))
        return y.repeat_interleave(s.heads // y.shape[1], dim=1)

    q, k, v = (heads(part, text) for part in "qkv")
    # V2V: softmax over a row's own key is 1, so that its own value is all there is.
    value = heads("v", visual)
    # T2T: causal, positions of text rows among themselves.
    causal = torch.ones(len(text), len(text), dtype=torch.bool).tril()
    out, lse_t = attend(rotate(q, s.rotary_base), rotate(k, s.rotary_base), v, causal)
    # T2V: the same queries, not rotated. Rows before the first image see no visual row.
    blind = int((~seen.any(dim=1)).sum())
    if blind < len(text):
        cross, lse_v = attend(q[blind:], heads("k", visual), value, seen[blind:])
        alpha = torch.sigmoid(lse_v - lse_t[blind:])
        out = torch.cat([out[:blind], alpha * cross + (1 - alpha) * out[blind:]])
    return linear(w, f"{name}.o_proj", value.flatten(1)), linear(
        w, f"{name}.o_proj", out.flatten(1)
    )


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of [rows, heads, size], and its log-sum-exp [rows, heads, 1]."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~seen, -math.inf)
    out = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v)
    return out, scores.logsumexp(dim=-1).T[..., None]


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary positions 0, 1, ... on rows [rows, heads, size]; pairs are i and i + size / 2."""
    half = x.shape[-1] // 2
    frequency = base ** -(torch.arange(half, dtype=x.dtype) / half)
    angle = torch.outer(torch.arange(len(x), dtype=x.dtype), frequency)[:, None]
    a, b = x.split(half, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def projector(w: Weights, s: Sizes, features: Tensor) -> Tensor:
    """Rows [patches, hidden] of features: two linears, norm, row and column positions, norm."""
    x = linear(w, f"{PROJECTOR}.linear_2", F.gelu(linear(w, f"{PROJECTOR}.linear_1", features)))
    x = rms_norm(x, w[f"{PROJECTOR}.norm.weight"], s.projector_eps)
    grid, half = math.isqrt(len(x)), x.shape[-1] // 2
    frequency = 10000.0 ** -(torch.arange(half, dtype=x.dtype) / half)
    angle = torch.outer(torch.arange(grid, dtype=x.dtype), frequency)
    wave = torch.cat([angle.sin(), angle.cos()], dim=-1)

    def place(axis: str) -> Tensor:
        name = f"{PROJECTOR}.{axis}_position"
        y = linear(w, f"{name}.fc2", F.gelu(linear(w, f"{name}.fc1", wave)))
        return rms_norm(y, torch.ones_like(y[0]), s.projector_eps)

    x = x + (place("row")[:, None] + place("column")[None]).flatten(0, 1)
    return rms_norm(x, w[f"{PROJECTOR}.output_norm.weight"], s.projector_eps)


def tower(w: Weights, s: Sizes, pixels: Tensor) -> Tensor:
    """SigLIP's features [patches, width] of one image."""

    def norm(name: str, x: Tensor) -> Tensor:
        scale, shift = w[f"{name}.weight"], w[f"{name}.bias"]
        return F.layer_norm(x, scale.shape, scale, shift, s.tower_eps)

    patches = f"{TOWER}.embeddings.patch_embedding"
    x = F.conv2d(pixels[None], w[f"{patches}.weight"], w[f"{patches}.bias"], stride=s.patch)
    x = x[0].flatten(1).T + w[f"{TOWER}.embeddings.position_embedding.weight"]
    everything = torch.ones(len(x), len(x), dtype=torch.bool)
    for layer in range(s.tower_layers):
        name = f"{TOWER}.encoder.layers.{layer}"
        y = norm(f"{name}.layer_norm1", x)
        q, k, v = (
            linear(w, f"{name}.self_attn.{part}_proj", y).unflatten(1, (s.tower_heads, -1))
            for part in "qkv"
        )
        y = attend(q, k, v, everything)[0].flatten(1)
        x = x + linear(w, f"{name}.self_attn.out_proj", y)
        y = linear(w, f"{name}.mlp.fc1", norm(f"{name}.layer_norm2", x))
        x = x + linear(w, f"{name}.mlp.fc2", F.gelu(y, approximate="tanh"))
    return norm(f"{TOWER}.post_layernorm", x)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """With a bias where there is one."""
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rows divided by the root of their mean square."""
    return weight * x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps)
