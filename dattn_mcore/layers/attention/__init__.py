"""Attention backends behind one object each (`backend.Backend`).

`inputs` has what goes in, `options` and `modes` what is computed. A new backend is one file, one
line in `_ALL`, and its name in `AttentionBackend` (`architectures/sizes.py`).

Source: arXiv 2502.01906, section 3; the merge is its equation for alpha.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dattn_mcore.errors import ConfigError
from dattn_mcore.layers.attention import flash, reference, sdpa, triton_backend
from dattn_mcore.layers.attention.backend import Backend
from dattn_mcore.layers.attention.inputs import AttentionInputs
from dattn_mcore.layers.attention.options import AttentionOptions
from dattn_mcore.layers.attention.rotary import Rotary

_ALL: tuple[Backend, ...] = (  # the fastest first; the last can compute everything
    flash.BACKEND,
    triton_backend.BACKEND,
    sdpa.BACKEND,
    reference.BACKEND,
)
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in _ALL}


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
    if requested != "auto":
        if requested not in BACKENDS:
            known = ", ".join(["auto", *BACKENDS])
            raise ConfigError(f"attention.backend={requested!r} is unknown; use one of {known}")
        if refusal := BACKENDS[requested].refuses(options, device_type, dtype, head_dim):
            raise ConfigError(
                f"attention.backend={requested} cannot be used: {refusal}; "
                "use attention.backend=auto"
            )
        return BackendChoice(requested, "as configured")
    reasons: list[str] = []
    for backend in BACKENDS.values():
        if backend.needs_gpu and device_type == "cpu":
            continue
        refusal = backend.refuses(options, device_type, dtype, head_dim)
        if refusal is None:
            reasons.append(backend.describe(head_dim))
            return BackendChoice(backend.name, "; ".join(filter(None, reasons)))
        reasons.append(f"not {backend.name}: {refusal}")
    raise AssertionError("the last backend computes everything")


__all__ = [
    "BACKENDS",
    "AttentionInputs",
    "AttentionOptions",
    "Backend",
    "BackendChoice",
    "Rotary",
    "choose_backend",
]
