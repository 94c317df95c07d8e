"""Tells base models of the same shapes apart: sums over one weight go with a folder of adapters.

The weight is the first layer's output projection (`architectures.adapters.summed_weight`). Its
values are rounded to bf16 first, so that a base that was exported in bf16 and converted back is the
same. Sums in float64 differ between layouts by rounding alone, far less than by another weight.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open

from dattn_mcore.errors import CheckpointError

Sums = tuple[float, float]
EXPORTED = "model.language_model.layers.0.self_attn.o_proj.weight"  # the weight's exported name
_METADATA = "dattn_base_sums"  # of the file of adapters, where `peft` looks for nothing
_CLOSE = 1e-9


def sums_of(weight: torch.Tensor) -> torch.Tensor:
    """Sum of a weight's values and of their squares, float64 [2]."""
    rounded = weight.detach().to(torch.bfloat16).double()
    return torch.stack([rounded.sum(), rounded.square().sum()])


def metadata_of(sums: Sums | None) -> dict[str, str]:
    """What a file of adapters says of them in its metadata."""
    return {} if sums is None else {_METADATA: json.dumps(sums)}


def sums_in(path: Path) -> Sums | None:
    """What a file of adapters says of its base; None: nothing, as where `peft` wrote it.

    Raises:
        SafetensorError: the file is damaged.
        ValueError: what it says is.
    """
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_METADATA)
    if text is None:
        return None
    first, second = (float(value) for value in json.loads(text))
    return first, second


def check_same_base(where: str, there: Sums, here: Sums) -> None:
    """Refuses adapters that have learnt beside other weights of the same shapes.

    Args:
        where: the folder of adapters, as messages name it.
        there: what it says of its base.
        here: of the base that it would be used on.

    Raises:
        CheckpointError: they differ.
    """
    scale = math.sqrt(abs(there[1])) or 1.0
    if any(abs(a - b) > _CLOSE * max(scale, abs(a)) for a, b in zip(there, here, strict=True)):
        raise CheckpointError(
            f"{where} is an adapter of another base model: its shapes fit, but the base that it "
            "learnt beside had other weights; start from that base"
        )
