"""Attention backends behind one signature.

Every backend is a function

    attend(q, k_text, v_text, k_visual, v_visual, q_visual, rotary, params, options)
        -> (text_output, visual_output)

Args:
    q: [T, heads, head_dim] queries of the text rows, not rotated.
    k_text, v_text: [T, groups, head_dim], not rotated.
    k_visual, v_visual: [V, groups, head_dim], not rotated.
    q_visual: [V, heads, head_dim] with `v2v=causal`, else None.
    rotary: angles of the text rows, and of the visual rows where the mode has them.
    params: the pack (`layers.layout.DecomposedSeqParams`).
    options: scale, soft-cap, window and mode.

Returns:
    text_output [T, heads, head_dim]; visual_output [V, heads, head_dim] with `v2v=causal`, else
    None. Padding rows are zero.

Heads are those of this tensor parallel rank; no backend communicates.
Source: arXiv 2502.01906, section 3; the merge is its equation for alpha.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dattn_mcore.errors import ConfigError
from dattn_mcore.layers.attention.flash import flash_attention, flash_chosen, flash_refuses
from dattn_mcore.layers.attention.options import AttentionOptions
from dattn_mcore.layers.attention.reference import reference_attention
from dattn_mcore.layers.attention.rotary import Rotary
from dattn_mcore.layers.attention.sdpa import sdpa_attention, sdpa_refuses
from dattn_mcore.layers.attention.triton_backend import triton_attention, triton_refuses

Backend = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]

BACKENDS: dict[str, Backend] = {
    "reference": reference_attention,
    "sdpa": sdpa_attention,
    "flash": flash_attention,
    "triton": triton_attention,
}


@dataclass(frozen=True)
class BackendChoice:
    """A backend and why it was taken."""

    name: str
    reason: str


def choose_backend(
    requested: str,
    options: AttentionOptions,
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
) -> BackendChoice:
    """Picks the backend for a layer; `auto` takes the fastest that can compute it.

    On a CPU that is `sdpa`; on a GPU `flash`, where flash-attn is installed, then `triton`. What
    is left is computed by `reference`, which can do everything, at the price of score matrices.

    Args:
        requested: `attention.backend`.
        options: what the layer computes.
        device_type: cpu, or another for a GPU.
        dtype: of activations.
        head_dim: size of a head.

    Raises:
        ConfigError: the requested backend is unknown, or cannot run here or compute this.
    """
    refusals = {
        "flash": flash_refuses(options, device_type, dtype, head_dim),
        "triton": triton_refuses(options, device_type, dtype, head_dim),
        "sdpa": sdpa_refuses(options, device_type, dtype),
    }
    if requested != "auto":
        if requested not in BACKENDS:
            known = ", ".join(["auto", *BACKENDS])
            raise ConfigError(f"attention.backend={requested!r} is unknown; use one of {known}")
        if refusal := refusals.get(requested):
            raise ConfigError(
                f"attention.backend={requested} cannot be used: {refusal}; "
                "use attention.backend=auto"
            )
        return BackendChoice(requested, "as configured")
    order = ("sdpa",) if device_type == "cpu" else ("flash", "triton", "sdpa")
    passed: list[str] = []
    for name in order:
        if refusals[name] is None:
            return BackendChoice(name, "; ".join([*passed, _WHY[name](head_dim)]))
        passed.append(f"not {name}: {refusals[name]}")
    return BackendChoice("reference", "; ".join(passed))


_WHY: dict[str, Callable[[int], str]] = {
    "flash": flash_chosen,
    "triton": lambda head_dim: "the joint Triton kernel computes this model",
    "sdpa": lambda head_dim: "PyTorch's flash kernels compute this model",
}


__all__ = ["BACKENDS", "AttentionOptions", "BackendChoice", "Rotary", "choose_backend"]
