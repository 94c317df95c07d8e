"""Decomposed attention on flash-attn 2 or 3 (varlen, soft-cap, window), for a GPU.

`merge` says how calls over visual and over text keys become one exact softmax. For its
backward pass the public functions of flash-attn do not do: they recompute with their own output
and log-sum-exp, and drop the latter's gradient. So the functions below them are called, which take
both from outside.

Source: Dao-AILab/flash-attention, `flash_attn/flash_attn_interface.py` (2.7 and later) and
`hopper/flash_attn_interface.py` (3, as of October 2025 and later).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import torch

from dattn_mcore.layers.attention.flash_sequences import Sequences, make_sequences
from dattn_mcore.layers.attention.merge import Passes
from dattn_mcore.layers.attention.options import AttentionOptions
from dattn_mcore.layers.attention.parts import attend_in_parts
from dattn_mcore.layers.attention.rotary import Rotary
from dattn_mcore.layers.attention.rows import passes_over_images
from dattn_mcore.layers.layout import DecomposedSeqParams
from dattn_mcore.parallel.platform import is_hopper

_MODULES = {2: "flash_attn.flash_attn_interface", 3: "flash_attn_interface"}
_ABSENT = "is not installed"
# Largest head size of 3's deterministic backward pass: `hopper/flash_api.cpp` rounds sizes above
# up to 256 and refuses that.
_ORDERED_3 = 192


def flash_refuses(
    options: AttentionOptions, device_type: str, dtype: torch.dtype, head_dim: int
) -> str | None:
    """Why flash-attn cannot run here or compute this; None if it can."""
    if device_type == "cpu":
        return "it needs a GPU"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes bf16 and fp16, not {dtype} (train.precision)"
    if head_dim > 256 or head_dim % 8:
        return f"head size {head_dim} is no multiple of 8 up to 256"
    if options.window is not None and not options.debiased and not options.is_baseline:
        return "it has no sliding window between text and visual rows in this mixed mode"
    if flash_version(head_dim) is None:
        return _why_no_version(head_dim)
    return None


def flash_version(head_dim: int) -> int | None:
    """The flash-attn that is used: 3 on a Hopper GPU where it can be, else 2; or None."""
    if is_hopper() and _problem(3) is None and not _only_unordered(head_dim):
        return 3
    return 2 if _problem(2) is None else None


def flash_chosen(head_dim: int) -> str:
    """Which flash-attn computes, and why not 3 where that is installed but not used."""
    chosen = f"flash-attn {flash_version(head_dim)} computes this model"
    why = _why_not_3(head_dim)
    return f"{chosen}; not flash-attn 3: it {why}" if why else chosen


def flash_attention(
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


def _why_no_version(head_dim: int) -> str:
    older, newer = _problem(2), _why_not_3(head_dim)
    if older == _ABSENT and newer is None:
        return f"the package flash-attn {_ABSENT} (pip install flash-attn)"
    return f"flash-attn 2 {older}" + (f", flash-attn 3 {newer}" if newer else "")


def _why_not_3(head_dim: int) -> str | None:
    """What keeps an installed flash-attn 3 from running on this GPU; None: nothing, or no such."""
    if not is_hopper() or (problem := _problem(3)) == _ABSENT:
        return None
    if problem is None and _only_unordered(head_dim):
        return f"has no deterministic backward pass for head size {head_dim} (train.deterministic)"
    return problem


def _only_unordered(head_dim: int) -> bool:
    """Whether a run must be deterministic where flash-attn 3 can add in any order only."""
    return head_dim > _ORDERED_3 and torch.are_deterministic_algorithms_enabled()


@functools.cache
def _problem(version: int) -> str | None:
    """Why a version cannot be used; None where it can. Imports it: a build may not fit PyTorch."""
    name = _MODULES[version]
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        return _ABSENT
    try:
        importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 (a build for another PyTorch raises anything)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"cannot be imported ({reason})"
    return None


def _kernels(head_dim: int) -> tuple[Any, Callable[..., tuple], Callable[..., None]]:
    """The module of the version for a head size, and how its two passes are called."""
    version = flash_version(head_dim)
    assert version is not None  # `choose_backend` has refused
    calls = (_forward_2, _backward_2) if version == 2 else (_forward_3, _backward_3)
    return importlib.import_module(_MODULES[version]), *calls


class _Parts:
    """The parts of a pack on flash-attn, one for each pass; see `parts.Parts`."""

    @staticmethod
    def causal(
        params: DecomposedSeqParams,
        name: str,
        lengths: tuple[int, ...],
        options: AttentionOptions,
        device: torch.device,
    ) -> Passes:
        key = ("flash", name)
        if key not in params.cache:
            ends = list(itertools.accumulate(lengths))
            spans = [(end - length, end) for end, length in zip(ends, lengths, strict=True)]
            spans = [span for span in spans if span[0] < span[1]]
            params.cache[key] = [make_sequences(spans, spans, True, device)] if spans else []
        return [[_Part(sequences, options, options.window)] for sequences in params.cache[key]]

    @staticmethod
    def blocks(
        params: DecomposedSeqParams, options: AttentionOptions, device: torch.device
    ) -> Passes:
        key = ("flash", "blocks")
        if key not in params.cache:
            params.cache[key] = [
                make_sequences(
                    [(block.text_start, block.text_stop) for block in blocks],
                    [(block.visual_start, block.visual_stop) for block in blocks],
                    False,
                    device,
                )
                for blocks in passes_over_images(params.blocks)
            ]
        return [[_Part(sequences, options, None)] for sequences in params.cache[key]]


class _Part:
    """One varlen call; see `merge.Part`."""

    def __init__(self, sequences: Sequences, options: AttentionOptions, window: int | None):
        self.sequences, self.options = sequences, options
        self.q_rows, self.k_rows = sequences.q_rows, sequences.k_rows
        # flash-attn counts the keys to the left of the own one; -1 is no window.
        self.left = -1 if window is None else window - 1
        self.right = 0 if sequences.causal else -1

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        module, call, _ = _kernels(q.shape[-1])
        out, lse = call(module, self, q, k, v)
        return out, lse.transpose(0, 1), None

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        state: None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        module, _, call = _kernels(q.shape[-1])
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        by_head = lse.transpose(0, 1).to(torch.float32).contiguous()
        call(module, self, grad, q, k, v, out, by_head, dq, dk, dv)
        return dq, dk, dv


def _forward_2(
    module: Any, part: _Part, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple:
    s, options = part.sequences, part.options
    out, lse, _, _ = module._flash_attn_varlen_forward(
        *(q, k, v, s.cu_q, s.cu_k, s.max_q, s.max_k),
        dropout_p=0.0,
        softmax_scale=options.scale,
        causal=s.causal,
        window_size_left=part.left,
        window_size_right=part.right,
        softcap=options.softcap or 0.0,
    )
    return out, lse


def _forward_3(
    module: Any, part: _Part, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple:
    s, options = part.sequences, part.options
    out, lse, *_ = module._flash_attn_forward(
        *(q, k, v),
        cu_seqlens_q=s.cu_q,
        cu_seqlens_k=s.cu_k,
        max_seqlen_q=s.max_q,
        max_seqlen_k=s.max_k,
        softmax_scale=options.scale,
        causal=s.causal,
        window_size_left=part.left,
        window_size_right=part.right,
        softcap=options.softcap or 0.0,
    )
    return out, lse


def _backward_2(module: Any, part: _Part, *tensors: torch.Tensor) -> None:
    """tensors: d_out, q, k, v, out, lse [heads, rows]; d_q, d_k, d_v are filled."""
    s, options = part.sequences, part.options
    module._flash_attn_varlen_backward(
        *(*tensors, s.cu_q, s.cu_k, s.max_q, s.max_k),
        dropout_p=0.0,
        softmax_scale=options.scale,
        causal=s.causal,
        window_size_left=part.left,
        window_size_right=part.right,
        softcap=options.softcap or 0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _backward_3(module: Any, part: _Part, *tensors: torch.Tensor) -> None:
    """As `_backward_2`. Positional: the name of the argument `causal` has changed over time."""
    s, options = part.sequences, part.options
    rows, grads = tensors[:6], tensors[6:]
    module._flash_attn_backward(
        *(*rows, s.cu_q, s.cu_k, None, None, s.max_q, s.max_k, *grads),
        *(options.scale, s.causal, part.left, part.right, options.softcap or 0.0),
        torch.are_deterministic_algorithms_enabled(),
    )
