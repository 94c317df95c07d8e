"""Block sizes and splits of the Triton kernels.

Sizes stand in a table and are never timed while training: a choice made by a stopwatch could
differ between two runs, and with it the last bit of a resumed run. `benchmarks/
attention_backends.py --tune` times the candidates on a device. The order here follows what the
compiler says for Hopper (shared memory, registers, spills); it has not been timed on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dattn_mcore.parallel.platform import processor_count


@dataclass(frozen=True)
class Blocks:
    """Tile of one kernel: query lines (row and head) by keys, and how it is compiled."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 1


@dataclass(frozen=True)
class Tuning:
    """What a caller may fix; None leaves the choice to the table.

    Attributes:
        forward, query, key: blocks of the forward kernel, of the gradient of queries, and of that
            of keys and values.
        visual_splits: parts of the loop over visual keys, merged afterwards.
        key_splits: parts of the loop over queries in the gradient of keys and values.
    """

    forward: Blocks | None = None
    query: Blocks | None = None
    key: Blocks | None = None
    visual_splits: int | None = None
    key_splits: int | None = None


# The largest head size of a line, then candidates, fastest first; the first that fits the
# device's shared memory is taken, so the last must fit everywhere.
_SIXTEEN_BIT: dict[str, dict[int, tuple[Blocks, ...]]] = {
    "forward": {
        64: (Blocks(128, 64, 4, 3), Blocks(128, 128, 8, 3), Blocks(64, 32, 4, 2)),
        128: (Blocks(128, 64, 8, 3), Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 32)),
        256: (Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2), Blocks(32, 32)),
    },
    "query": {
        64: (Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 1)),
        128: (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2), Blocks(64, 32)),
        256: (Blocks(128, 32, 8, 2), Blocks(64, 64, 8, 1), Blocks(64, 32, 4, 1), Blocks(32, 32)),
    },
    "key": {
        64: (Blocks(64, 128, 8, 3), Blocks(64, 64, 4, 2), Blocks(32, 64, 4, 1)),
        128: (Blocks(64, 128, 8, 2), Blocks(64, 128, 8, 1), Blocks(32, 64, 4, 2), Blocks(32, 32)),
        256: (Blocks(32, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(32, 64, 8, 1), Blocks(32, 32)),
    },
}
_FLOAT32: dict[str, dict[int, tuple[Blocks, ...]]] = {
    "forward": {
        64: (Blocks(32, 32, 8, 2), Blocks(32, 32)),
        128: (Blocks(32, 16, 8, 2), Blocks(16, 16)),
        256: (Blocks(16, 16, 8, 2),),
    },
    "query": {
        64: (Blocks(32, 32, 8, 2), Blocks(32, 32)),
        128: (Blocks(16, 32, 8, 2), Blocks(16, 16)),
        256: (Blocks(16, 16, 8, 2),),
    },
    "key": {
        64: (Blocks(32, 32, 8, 2), Blocks(32, 32)),
        128: (Blocks(32, 16, 8, 2), Blocks(16, 16)),
        256: (Blocks(16, 16, 8, 2),),
    },
}
_INTERPRETED = (Blocks(32, 32),)
_MINIMUM_LINES = 16  # of a matrix product's tile


def candidates(
    kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Blocks, ...]:
    """Blocks to try, the fastest first."""
    if device.type == "cpu":
        return _INTERPRETED
    table = (_FLOAT32 if dtype is torch.float32 else _SIXTEEN_BIT)[kernel]
    return next(choice for size, choice in sorted(table.items()) if head_dim <= size)


def fitted(blocks: Blocks, lines: int, ratio: int) -> Blocks:
    """Blocks with no more query lines than the longest sample has, and room for one row.

    Args:
        blocks: from the table or the caller.
        lines: query lines of the longest sample.
        ratio: query heads per group; one row's lines.
    """
    wanted = max(_MINIMUM_LINES, 1 << (max(lines, 1) - 1).bit_length())
    queries = max(min(blocks.queries, wanted), 1 << (ratio - 1).bit_length())
    return Blocks(queries, blocks.keys, blocks.warps, blocks.stages)


def splits(programs: int, most_blocks: int, device: torch.device) -> int:
    """Parts of an inner loop, so that few programs with a long loop still fill the device.

    Args:
        programs: programs without a split.
        most_blocks: blocks in the longest loop; a part has at least four.
        device: where it runs.
    """
    return splits_for(programs, most_blocks, processor_count(device))


def splits_for(programs: int, most_blocks: int, processors: int) -> int:
    """`splits` of a device with so many processors."""
    free = processors // max(programs, 1)
    return max(1, min(free, most_blocks // 4, 64))
