"""Whether modules still compute what they computed before: their weights and settings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLED = 256  # numbers of each weight that are read, or up to twice as many
_WEIGHTS = ("_parameters", "_buffers")
_NO_SETTINGS = (*_WEIGHTS, "_modules")
_PLAIN = {type(None), bool, int, float, str, torch.dtype, torch.device}


def state_of(model: nn.Module, parts: Iterable[nn.Module]) -> tuple[Any, ...]:
    """A value that is another one when the parts compute something else.

    Of each weight: where it lies, how often PyTorch counts it changed, and some of its numbers,
    evenly spread. The numbers show what is not counted: a merged adapter is added through `.data`.
    Of each module: its plain attributes and hooks, such as an adapter's scale or whether it is on.
    Beside them what PyTorch computes with: autocast, and the precision of float32.

    Args:
        model: what the parts belong to; another model has another state.
        parts: modules whose output is kept.

    Raises:
        ValueError: a weight was made under `torch.inference_mode`, where changes are not counted.
    """
    found: list[Any] = [id(model), torch.get_float32_matmul_precision()]
    weights: list[Tensor] = []
    for part in parts:
        for module in part.modules():
            own = vars(module)
            found.append(type(module))
            for name, value in own.items():
                if type(value) in _PLAIN:
                    found.append((name, value))
                elif name not in _NO_SETTINGS and not (isinstance(value, dict) and not value):
                    found.append((name, _plain(value)))
            for name in _WEIGHTS:
                weights += [weight for weight in own[name].values() if weight is not None]
    if any(weight.is_inference() for weight in weights):
        raise ValueError(
            "image_cache cannot see whether weights change that were made under "
            "torch.inference_mode(); load the model outside of it, or leave image_cache out"
        )
    for kind in {weight.device.type for weight in weights if not weight.is_meta}:
        if torch.is_autocast_enabled(kind):
            found.append((kind, torch.get_autocast_dtype(kind)))
    samples: dict[Any, list[Tensor]] = {}
    for weight in weights:
        found.append((weight.data_ptr(), weight._version, weight.shape, weight.dtype))
        if not weight.is_meta and weight.numel():
            flat = weight.detach().reshape(-1)
            spread = flat[:: max(1, len(flat) // _SAMPLED)]
            samples.setdefault((weight.device, weight.dtype), []).append(spread)
    digest = hashlib.blake2b(digest_size=20)
    for spreads in samples.values():
        digest.update(torch.cat(spreads).view(torch.uint8).cpu().numpy().data)
    return (*found, digest.digest())


def _plain(value: Any) -> Any:
    """A value that says what another one is; of hooks and functions, which one."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Mapping):
        return tuple((_plain(key), _plain(held)) for key, held in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(_plain(held) for held in value)
    return id(value) if callable(value) else type(value)


__all__ = ["state_of"]
