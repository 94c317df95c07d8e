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
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dattn_mcore.layers.attention.calls import PartByCalls, attend_by_calls
from dattn_mcore.layers.attention.flash_sequences import (
    Sequences,
    make_sequences,
    sequence_passes,
)
from dattn_mcore.layers.attention.inputs import AttentionInputs
from dattn_mcore.layers.attention.merge import Passes
from dattn_mcore.layers.attention.modes import InBlocks, KeySet
from dattn_mcore.layers.attention.options import AttentionOptions
from dattn_mcore.layers.layout import DecomposedSeqParams
from dattn_mcore.parallel.packages import ABSENT, import_problem
from dattn_mcore.parallel.platform import is_hopper

_MODULES = {2: "flash_attn.flash_attn_interface", 3: "flash_attn_interface"}
# What is called of each, by name. Both once took a window as a pair, in `window_size`.
_CALLED = {
    2: ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"),
    3: ("_flash_attn_forward", "_flash_attn_backward"),
}
_NEEDED = frozenset({"window_size_left", "window_size_right", "softcap", "deterministic"})
# Largest head size of 3's deterministic backward pass: `hopper/flash_api.cpp` rounds sizes above
# up to 256 and refuses that.
_ORDERED_3 = 192


@dataclass(frozen=True)
class FlashBackend:
    """See the module."""

    name: str = "flash"
    needs_gpu: bool = True

    def refuses(
        self, options: AttentionOptions, device_type: str, dtype: torch.dtype, head_dim: int
    ) -> str | None:
        """See `Backend`."""
        if device_type == "cpu":
            return "it needs a GPU"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"it computes bf16 and fp16, not {dtype} (train.precision)"
        if head_dim > 256 or head_dim % 8:
            return f"head size {head_dim} is no multiple of 8 up to 256"
        if options.window_skips_positions:
            return "it has no sliding window between text and visual rows in this mixed mode"
        if flash_version(head_dim) is None:
            return _why_no_version(head_dim)
        return None

    def describe(self, head_dim: int) -> str:
        """Which flash-attn computes, and why not 3 where that is installed but not used."""
        chosen = f"flash-attn {flash_version(head_dim)} computes this model"
        why = _why_not_3(head_dim)
        return f"{chosen}; not flash-attn 3: it {why}" if why else chosen

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


BACKEND = FlashBackend()


def _passes(
    key_set: KeySet, params: DecomposedSeqParams, options: AttentionOptions, device: torch.device
) -> Passes:
    """One varlen call for each pass; see `calls.MakePasses`."""
    sees = key_set.sees
    key = ("flash", *key_set.key)
    if key not in params.cache:
        causal = not isinstance(sees, InBlocks)
        params.cache[key] = [
            make_sequences(rectangles, causal=causal, device=device)
            for rectangles in sequence_passes(sees)
        ]
    return [[_VarlenCall(sequences, options, sees.window)] for sequences in params.cache[key]]


def flash_version(head_dim: int) -> int | None:
    """The flash-attn that is used: 3 on a Hopper GPU where it can be, else 2; or None."""
    if is_hopper() and _problem(3) is None and not _only_unordered(head_dim):
        return 3
    return 2 if _problem(2) is None else None


def _why_no_version(head_dim: int) -> str:
    older, newer = _problem(2), _why_not_3(head_dim)
    if older == ABSENT and newer is None:
        return f"the package flash-attn {ABSENT} (pip install flash-attn)"
    return f"flash-attn 2 {older}" + (f", flash-attn 3 {newer}" if newer else "")


def _why_not_3(head_dim: int) -> str | None:
    """What keeps an installed flash-attn 3 from running on this GPU; None: nothing, or no such."""
    if not is_hopper() or (problem := _problem(3)) == ABSENT:
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
    if problem := import_problem(name):
        return problem
    module = importlib.import_module(name)
    forward, backward = (_arguments(getattr(module, called, None)) for called in _CALLED[version])
    missing = sorted((_NEEDED - {"deterministic"} - forward) | (_NEEDED - backward))
    if missing:
        return f"is too old or of another kind: its functions have no argument {missing[-1]}"
    return None


def _arguments(function: Callable[..., Any] | None) -> frozenset[str]:
    """Names of a function's arguments; all that are needed where it does not tell them.

    PyTorch's custom operators do not; flash-attn's functions became such together with these names.
    """
    if function is None:
        return frozenset()
    parameters = inspect.signature(function).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return _NEEDED
    return frozenset(parameters)


def _kernels(head_dim: int) -> tuple[Any, Callable[..., tuple], Callable[..., None]]:
    """The module of the version for a head size, and how its two passes are called."""
    version = flash_version(head_dim)
    assert version is not None  # `choose_backend` has refused
    calls = (_forward_2, _backward_2) if version == 2 else (_forward_3, _backward_3)
    return importlib.import_module(_MODULES[version]), *calls


class _VarlenCall:
    """One varlen call; see `merge.KernelCall`."""

    def __init__(self, sequences: Sequences, options: AttentionOptions, window: int | None):
        self.sequences, self.options = sequences, options
        self.q_rows, self.k_rows = sequences.q_rows, sequences.k_rows
        # flash-attn counts the keys to the left of the own one; -1 is no window.
        self.left = -1 if window is None else window - 1
        self.right = 0 if sequences.causal else -1

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        module, forward, _ = _kernels(q.shape[-1])
        out, lse = forward(module, self, q, k, v)
        return out, lse.transpose(0, 1), None

    def backward(
        self,
        grad: torch.Tensor,
        *,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        state: None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        module, _, backward = _kernels(q.shape[-1])
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        by_head = lse.transpose(0, 1).to(torch.float32).contiguous()
        rows, grads = (grad, q, k, v, out, by_head), (dq, dk, dv)
        backward(module, self, rows, grads)
        return dq, dk, dv

    def logits(self) -> dict[str, Any]:
        """Keyword arguments that both versions of flash-attn name alike."""
        return {
            "softmax_scale": self.options.scale,
            "causal": self.sequences.causal,
            "window_size_left": self.left,
            "window_size_right": self.right,
            "softcap": self.options.softcap or 0.0,
        }


def _forward_2(
    module: Any, call: _VarlenCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    s = call.sequences
    out, lse, _, _ = module._flash_attn_varlen_forward(
        q, k, v, s.cu_q, s.cu_k, s.max_q, s.max_k, dropout_p=0.0, **call.logits()
    )
    return out, lse


def _forward_3(
    module: Any, call: _VarlenCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    s = call.sequences
    out, lse, *_ = module._flash_attn_forward(
        q,
        k,
        v,
        cu_seqlens_q=s.cu_q,
        cu_seqlens_k=s.cu_k,
        max_seqlen_q=s.max_q,
        max_seqlen_k=s.max_k,
        **call.logits(),
    )
    return out, lse


def _backward_2(
    module: Any,
    call: _VarlenCall,
    rows: tuple[torch.Tensor, ...],
    grads: tuple[torch.Tensor, ...],
) -> None:
    """rows: d_out, q, k, v, out and lse [heads, rows]; grads: d_q, d_k, d_v are filled."""
    s = call.sequences
    module._flash_attn_varlen_backward(
        *rows,
        *grads,
        s.cu_q,
        s.cu_k,
        s.max_q,
        s.max_k,
        dropout_p=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **call.logits(),
    )


def _backward_3(
    module: Any,
    call: _VarlenCall,
    rows: tuple[torch.Tensor, ...],
    grads: tuple[torch.Tensor, ...],
) -> None:
    """As `_backward_2`. Positional: the name of the argument `causal` has changed over time."""
    s = call.sequences
    module._flash_attn_backward(
        *rows,
        s.cu_q,
        s.cu_k,
        None,  # sequences' lengths, where they end early
        None,
        s.max_q,
        s.max_k,
        *grads,
        call.options.scale,
        s.causal,
        call.left,
        call.right,
        call.options.softcap or 0.0,
        torch.are_deterministic_algorithms_enabled(),
    )
