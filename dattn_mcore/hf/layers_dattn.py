"""Norm, gated MLP, rotary positions and embedding of language models.

They are written out here, since transformers keeps its own inside the modeling files of those
models and changes them from release to release. Each gives the bits of transformers' own.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Rotation(NamedTuple):
    """What rotates queries and keys to the positions of their rows.

    Attributes:
        cos, sin: [batch, rows, head_dim].
        query_scale: [batch, rows], which rotated queries are multiplied by; None for 1.
    """

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None = None


class DattnRMSNorm(nn.Module):
    """Root-mean-square norm in float32.

    Args:
        size: width of the last axis.
        eps: added to the mean square.
        zero_centred: scales by 1 + weight, before it rounds to the input's dtype.
        start: factor of a fresh model.
    """

    def __init__(
        self, size: int, eps: float, zero_centred: bool = False, start: float = 1.0
    ) -> None:
        super().__init__()
        self.eps, self.zero_centred = eps, zero_centred
        self.initial = start - 1.0 if zero_centred else start
        self.weight = nn.Parameter(torch.full((size,), self.initial))

    def forward(self, x: Tensor) -> Tensor:
        """Norms the last axis."""
        wide = x.float()
        y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.zero_centred:
            return (y * (1.0 + self.weight.float())).to(x.dtype)
        return self.weight * y.to(x.dtype)


class DattnMLP(nn.Module):
    """Gated MLP.

    Args:
        text: sizes.
        activation: `silu`, or `gelu_tanh`, the tanh-approximated GELU.

    Raises:
        ValueError: the sizes come with another activation.
    """

    def __init__(self, text: Any, activation: str) -> None:
        super().__init__()
        self.gelu = activation == "gelu_tanh"
        field = "hidden_activation" if hasattr(text, "hidden_activation") else "hidden_act"
        expected = "gelu_pytorch_tanh" if self.gelu else "silu"
        if getattr(text, field) != expected:
            raise ValueError(
                f"text_config.{field} is {getattr(text, field)!r}; text_features say {expected!r}"
            )
        self.gate_proj = nn.Linear(text.hidden_size, text.intermediate_size, bias=False)
        self.up_proj = nn.Linear(text.hidden_size, text.intermediate_size, bias=False)
        self.down_proj = nn.Linear(text.intermediate_size, text.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the MLP to the last axis."""
        gate = self.gate_proj(x)
        gate = F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate)
        return self.down_proj(gate * self.up_proj(x))


class DattnEmbedding(nn.Embedding):
    """Token embedding, multiplied by `scale` (rounded to the weight's dtype) where it is given."""

    def __init__(self, size: int, width: int, padding: int | None, scale: float | None) -> None:
        super().__init__(size, width, padding)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """Embeds token ids."""
        embedded = super().forward(input)
        return embedded if self.scale is None else scaled(embedded, self.scale)


class DattnRotary(nn.Module):
    """Cosines and sines of rotary positions.

    Args:
        head_dim: size of a head, all of it rotated.
        rope: one entry of transformers' `rope_parameters`: `default`, `linear` (all frequencies
            divided), `llama3` or `yarn` (slow waves divided, fast ones not, those between blended).
            The last scales what it rotates by `attention_factor`, and queries by their position
            where `llama_4_scaling_beta` is given. Besides `none`, of layers without positions.

    The frequencies are no buffer: they are no weights, and a loader that builds models without
    memory and then fills in what a file holds must find nothing else to fill in.

    Raises:
        ValueError: the configuration asks for another kind of rotary positions.
    """

    def __init__(self, head_dim: int, rope: dict[str, Any]) -> None:
        super().__init__()
        kinds = {
            "default": _as_they_are,
            "linear": _linear,
            "llama3": _llama3,
            "yarn": _yarn,
            "none": _none,
        }
        kind, share = rope["rope_type"], rope.get("partial_rotary_factor")
        if kind not in kinds or share not in (None, 1.0):
            raise ValueError(
                f"text_config.rope_parameters are {rope}; rope_type must be one of "
                f"{', '.join(kinds)}, and all of a head rotated"
            )
        yarn: dict[str, Any] = rope if kind == "yarn" else {"attention_factor": 1.0}
        if yarn.get("attention_factor") is None:
            raise ValueError(
                f"text_config.rope_parameters are {rope}; they must have attention_factor, a "
                "number (nothing is worked out of mscale here)"
            )
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float, device="cpu")
        self.frequencies = kinds[kind](rope["rope_theta"] ** (exponent / head_dim), rope)
        self.factor: float = yarn["attention_factor"]
        self.beta: float = yarn.get("llama_4_scaling_beta") or 0.0
        self.original_length: float = yarn.get("original_max_position_embeddings", 0.0)

    def forward(self, position: Tensor, dtype: torch.dtype) -> Rotation:
        """Factors for int64 positions [batch, rows]."""
        if self.frequencies.device != position.device:
            self.frequencies = self.frequencies.to(position.device)
        angle = position[..., None].float() * self.frequencies
        angle = torch.cat([angle, angle], dim=-1)
        cos, sin = angle.cos() * self.factor, angle.sin() * self.factor
        return Rotation(cos.to(dtype), sin.to(dtype), self._query_scale(position, dtype))

    def _query_scale(self, position: Tensor, dtype: torch.dtype) -> Tensor | None:
        """1 for the first `original_length` positions, then slowly more."""
        if self.beta == 0:
            return None
        lengths = torch.floor(position / self.original_length)
        return (1 + self.beta * torch.log(1 + lengths)).to(dtype)


# Frequencies from wave lengths over 2 pi, in the operations of transformers.


def _as_they_are(waves: Tensor, rope: dict[str, Any]) -> Tensor:
    return 1.0 / waves


def _none(waves: Tensor, rope: dict[str, Any]) -> Tensor:
    return torch.zeros_like(waves)  # a rotation by 0, which changes no bit


def _linear(waves: Tensor, rope: dict[str, Any]) -> Tensor:
    return 1.0 / waves / rope["factor"]


def _llama3(waves: Tensor, rope: dict[str, Any]) -> Tensor:
    frequencies = 1.0 / waves
    factor, length = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wave = 2 * math.pi / frequencies
    share = (length / wave - low) / (high - low)
    blended = (1 - share) * frequencies / factor + share * frequencies
    divided = torch.where(wave > length / low, frequencies / factor, frequencies)
    return torch.where((wave < length / high) | (wave > length / low), divided, blended)


def _yarn(waves: Tensor, rope: dict[str, Any]) -> Tensor:
    theta, length = rope["rope_theta"], rope["original_max_position_embeddings"]
    size = 2 * len(waves)

    def place(turns: float) -> float:  # of the wave that turns so often in the original length
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = place(rope.get("beta_fast") or 32), place(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    width = last - first or 0.001
    places = torch.arange(len(waves), dtype=torch.float, device=waves.device)
    kept = 1 - ((places - first) / width).clamp(0, 1)
    return 1.0 / (rope["factor"] * waves) * (1 - kept) + 1.0 / waves * kept


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotates [batch, heads, rows, head_dim] by the last `rows` entries of `rotation`."""
    rows, half = x.shape[2], x.shape[3] // 2
    cos, sin = (factor[:, None, factor.shape[1] - rows :] for factor in rotation[:2])
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin


def rotate_queries(x: Tensor, rotation: Rotation) -> Tensor:
    """`rotate`, with the scale that queries get and keys do not."""
    rotated = rotate(x, rotation)
    if rotation.query_scale is None:
        return rotated
    scale = rotation.query_scale
    return rotated * scale[:, None, scale.shape[1] - x.shape[2] :, None]


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """Repeats each head of [batch, heads, rows, head_dim] for the queries that share it."""
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def scaled(x: Tensor, scale: float) -> Tensor:
    """Multiplies by a factor that is rounded to the dtype of `x` first, as transformers does."""
    return x * torch.tensor(scale, dtype=torch.float).to(x.dtype)


__all__ = [
    "DattnEmbedding",
    "DattnMLP",
    "DattnRMSNorm",
    "DattnRotary",
    "Rotation",
    "repeat_heads",
    "rotate",
    "rotate_queries",
    "scaled",
]
