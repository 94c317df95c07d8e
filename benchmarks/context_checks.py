"""What `context_ranks` counts, held against closed forms, the planner and the operating system."""

from __future__ import annotations

from typing import Any

from benchmarks.context_formulas import Shape
from benchmarks.context_ranks import Sent, step_config
from dattn_mcore.plan.context import (
    attention_bytes_sent,
    context_bytes,
    dealt_bytes,
    rank_rows,
)
from dattn_mcore.plan.rows import rows_of

# Bytes that a CPU's backend adds to a call at most, for each rank of the group: messages' headers.
HEADERS = 256


def planned_bytes(shape: Shape, ranks: int, layers: int, recompute: str = "none") -> dict[str, Any]:
    """Bytes of `layer`, forward and backward, and of a step: `attention` and `exchange`.

    Args:
        shape: of a layer's attention over one pack of one sample.
        ranks: context parallel.
        layers: of the model that makes a step.
        recompute: `train.recompute` of it.
    """
    config = step_config(shape, ranks, layers, recompute)
    pack = rows_of(config, (((True, shape.visual), (False, shape.text)),), shape.text / 2)
    own = rank_rows(config, pack)
    return {
        "layer": attention_bytes_sent(config, own),
        "attention": context_bytes(config, 0, own),
        "exchange": dealt_bytes(config, pack),
    }


def problems(row: dict[str, Any], layers: int) -> list[str]:
    """What of a row is not as it must be, one line each."""
    found = []
    for name in ("attention", "ring"):
        formula = tuple(row["formula" if name == "attention" else "ring_formula"])
        for rank, one in enumerate(Sent(**fields) for fields in row[name]):
            counted = one.forward, one.backward
            if counted != formula:
                found.append(f"{name}, rank {rank}: counted {counted}, closed form {formula}")
            over = 0 if one.written is None else one.written - sum(counted)
            if not 0 <= over <= HEADERS * row["ranks"] * one.calls:
                found.append(f"{name}, rank {rank}: {over} bytes written that are not counted")
    expected = layers * sum(row["formula"])
    found += [
        f"step, rank {rank}: counted {one['attention']}, closed form of all layers {expected}"
        for rank, one in enumerate(row["step"])
        if one["attention"] != expected
    ]
    most = tuple(row["formula"]), expected, max(one["exchange"] for one in row["step"])
    planned = tuple(row["planned"][name] for name in ("layer", "attention", "exchange"))
    if most != planned:
        found.append(f"planner: {planned}, counted {most}")
    return found
