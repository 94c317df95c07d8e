"""Bytes of weights, gradients and optimizer states on a rank, as Megatron-Core lays them out.

Trained parameters live in one buffer per dtype and model chunk, in reverse order, with float32
gradients beside them; frozen ones stay where they were. The distributed optimizer cuts each
bucket evenly over the data parallel ranks; a rank keeps float32 masters (of bf16 parameters only)
and Adam's two moments of its piece.

Source: megatron-core 0.16.1, distributed/param_and_grad_buffer.py (padding, buckets) and
optimizer/distrib_optimizer.py (ranges).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dattn_mcore.config.schema import Config
from dattn_mcore.plan.parameters import BYTES, Parameter, stage_parameters

PARAMETER_ALIGNMENT = 64  # elements
BUCKET_ALIGNMENT = 128


@dataclass(frozen=True)
class StateMemory:
    """Bytes on one rank.

    Attributes:
        parameters: number of parameters.
        trained: those with a gradient.
        weights: in their own dtype, padding of buffers included, and their running mean.
        gradients: float32, padding included.
        optimizer: of the data parallel rank that holds most.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int


@dataclass(frozen=True)
class _Buffer:
    dtype: str
    places: tuple[tuple[int, int], ...]  # [start, end) of each parameter
    buckets: tuple[tuple[int, int], ...]


def state_memory(config: Config, stage: int, dp: int) -> StateMemory:
    """Weights, gradients and optimizer states of a rank of a stage.

    Args:
        config: a checked configuration.
        stage: pipeline stage, from 0.
        dp: ranks that share the optimizer: data times context parallel ones.
    """
    chunks = stage_parameters(config, stage)
    everything = [parameter for chunk in chunks for parameter in chunk]
    buffers = [buffer for chunk in chunks for buffer in _buffers(chunk, dp)]
    frozen = sum(p.numel * BYTES[p.dtype] for p in everything if not p.trained)
    sizes = [(buffer, buffer.buckets[-1][1]) for buffer in buffers]
    trained = sum(p.numel for p in everything if p.trained)
    ema = 4 * trained if config.train.ema_decay is not None else 0
    return StateMemory(
        parameters=sum(p.numel for p in everything),
        trained=trained,
        weights=frozen + ema + sum(size * BYTES[buffer.dtype] for buffer, size in sizes),
        gradients=sum(4 * size for _, size in sizes),
        optimizer=max(_optimizer_bytes(buffers, dp)),
    )


def optimizer_bytes(config: Config, stage: int, dp: int) -> list[int]:
    """Bytes of masters and moments on each of the `dp` ranks of a stage; see `state_memory`."""
    chunks = stage_parameters(config, stage)
    return _optimizer_bytes([buffer for chunk in chunks for buffer in _buffers(chunk, dp)], dp)


def _optimizer_bytes(buffers: list[_Buffer], dp: int) -> list[int]:
    total = np.zeros(dp, dtype=np.int64)
    for buffer in buffers:
        total += (12 if buffer.dtype == "bf16" else 8) * _owned(buffer, dp)
    return total.tolist()


def _buffers(chunk: list[Parameter], dp: int) -> list[_Buffer]:
    kinds = dict.fromkeys(p.dtype for p in chunk if p.trained)
    return [
        _lay_out([p for p in chunk if p.trained and p.dtype == kind], kind, dp) for kind in kinds
    ]


def _lay_out(parameters: list[Parameter], dtype: str, dp: int) -> _Buffer:
    places, buckets = [], []
    start = bucket_start = 0
    open_bucket = False
    for parameter in reversed(parameters):
        start = _up(start, PARAMETER_ALIGNMENT)
        if parameter.shared_embedding and open_bucket:
            start = _up(start, math.lcm(dp, BUCKET_ALIGNMENT))
            buckets.append((bucket_start, start))
            bucket_start, open_bucket = start, False
        end = start + parameter.numel
        places.append((start, end))
        start, open_bucket = end, True
        if parameter.shared_embedding:
            start = _up(end, math.lcm(dp, BUCKET_ALIGNMENT))
            buckets.append((bucket_start, start))
            bucket_start, open_bucket = start, False
    if open_bucket:
        buckets.append((bucket_start, _up(start, math.lcm(dp, BUCKET_ALIGNMENT))))
    return _Buffer(dtype, tuple(places), tuple(buckets))


def _owned(buffer: _Buffer, dp: int) -> np.ndarray:
    """Elements of parameters (no padding) in each data parallel rank's pieces of the buckets."""
    starts, stops = np.array(buffer.places, dtype=np.int64).T
    before = np.concatenate([[0], np.cumsum(stops - starts)])  # elements before each parameter
    total = np.zeros(dp, dtype=np.int64)
    for begin, end in buffer.buckets:
        cuts = begin + np.arange(dp + 1) * ((end - begin) // dp)
        # Of each cut: the parameter in which it falls, or the next; after all of them, none.
        index = np.searchsorted(stops, cuts)
        inside = np.maximum(cuts - np.append(starts, end)[index], 0)
        total += np.diff(before[index] + inside)
    return total


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
