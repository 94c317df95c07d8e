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
from dattn_mcore.layers.attention.options import AttentionOptions
from dattn_mcore.layers.attention.reference import reference_attention
from dattn_mcore.layers.attention.rotary import Rotary
from dattn_mcore.layers.attention.sdpa import sdpa_attention, sdpa_refuses

Backend = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]

BACKENDS: dict[str, Backend] = {"reference": reference_attention, "sdpa": sdpa_attention}


@dataclass(frozen=True)
class BackendChoice:
    """A backend and why it was taken."""

    name: str
    reason: str


def choose_backend(
    requested: str, options: AttentionOptions, device_type: str, dtype: torch.dtype
) -> BackendChoice:
    """Picks the backend for a layer; `auto` takes the fastest that can compute it.

    Raises:
        ConfigError: the requested backend cannot compute these options.
    """
    refusal = sdpa_refuses(options, device_type, dtype)
    if requested == "sdpa" and refusal:
        raise ConfigError(
            f"attention.backend=sdpa cannot compute {refusal}; use attention.backend=auto"
        )
    if requested == "auto":
        if refusal:
            return BackendChoice("reference", f"sdpa cannot compute {refusal}")
        return BackendChoice("sdpa", "PyTorch's flash kernels compute this model")
    if requested not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise ConfigError(f"attention.backend={requested!r} is unknown; use one of {known}")
    return BackendChoice(requested, "as configured")


__all__ = ["BACKENDS", "AttentionOptions", "BackendChoice", "Rotary", "choose_backend"]
