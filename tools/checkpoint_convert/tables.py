"""The check that every tensor of a table is accounted for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from dattn_mcore.architectures.parameters import Entry, Shape, part_of
from dattn_mcore.errors import CheckpointError

DTYPES = (torch.bfloat16, torch.float32, torch.float16)  # of weights


def mcore_shapes(table: list[Entry]) -> dict[str, Shape]:
    """Shape of every Megatron-Core key."""
    return {entry.key: entry.mcore_shape() for entry in table if entry.key is not None}


def hf_shapes(table: list[Entry]) -> dict[str, Shape]:
    """Shape of every Hugging Face name."""
    return {
        name: shape
        for entry in table
        for layer in entry.steps()
        for name, shape in zip(entry.names(layer), entry.parts.values(), strict=True)
    }


def check_keys(
    where: str,
    expected: Mapping[str, Shape],
    found: Mapping[str, torch.Size | Shape],
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """Checks that exactly the expected tensors are there, and that each part has one dtype.

    Raises:
        CheckpointError: naming every missing, extra, wrongly shaped and wrongly typed tensor.
    """
    problems = [f"missing {key}" for key in expected if key not in found]
    problems += [f"extra {key}" for key in found if key not in expected]
    problems += [
        f"{key} is {list(found[key])} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in found and tuple(found[key]) != shape
    ]
    known = {key: dtypes[key] for key in expected if key in found}
    usual = {
        group: Counter(dtype for key, dtype in known.items() if dtype_group(key) == group)
        for group in {dtype_group(key) for key in known}
    }
    for key, dtype in known.items():
        wanted = next((d for d, _ in usual[dtype_group(key)].most_common() if d in DTYPES), None)
        if dtype != wanted:
            names = [str(d or DTYPES[0]).removeprefix("torch.") for d in (dtype, wanted)]
            problems.append(f"{key} is {names[0]} instead of {names[1]}")
    if problems:
        raise CheckpointError(
            f"{where}: {len(problems)} tensors do not fit the configuration: "
            f"{'; '.join(problems)}; is this another model?"
        )


def dtype_group(name: str) -> str:
    """Which tensors have one dtype: `vision`, `projector`, `llm`, or the float32 `positions`."""
    return "positions" if "_position.fc" in name else part_of(name)
