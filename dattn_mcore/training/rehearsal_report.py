"""What `--rehearse` prints: a rank's bytes and collectives, beside the planner's."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from dattn_mcore.config.checks import sizes_of_replica
from dattn_mcore.config.schema import Config
from dattn_mcore.parallel.collectives import Collective
from dattn_mcore.parallel.rehearsal import TORCH
from dattn_mcore.plan.activations import working_memory
from dattn_mcore.plan.communication import (
    data_bytes,
    pipeline_bytes,
    tensor_bytes,
    tower_gradient_bytes,
)
from dattn_mcore.plan.context import context_bytes, dealt_bytes, rank_rows, tower_ranks
from dattn_mcore.plan.rows import rows_of
from dattn_mcore.plan.state_memory import optimizer_bytes, state_memory
from dattn_mcore.training.rehearse import (
    Rehearsed,
    as_rehearsed,
    full_pack,
    last_stage_rank,
    rehearse,
)

# Groups of the planner, by Megatron-Core's.
_PLANNED = {
    **{"tp": "tensor", "cp": "context", "tp_cp": "tensor x context"},
    **{"pp": "pipeline", "dp": "data", "dp_cp": "data"},
}
_UNSEEN = (
    "not seen here: kernels and their work space, buffers of the library that exchanges, what the "
    "allocator holds back, other programs on the GPU"
)
_OPTIMIZER = "optimizer states: PyTorch's Adam, whose bytes are those of the fused ones"
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """A number of a rehearsal, beside the planner's.

    Attributes:
        name: what it is.
        rehearsed: bytes.
        planned: bytes; None: the planner says nothing of it.
        exact: they must be equal.
    """

    name: str
    rehearsed: float
    planned: float | None
    exact: bool = False

    @property
    def apart(self) -> float:
        """Planned over rehearsed, less one; 0 where there is nothing to compare."""
        if self.planned is None or self.planned == self.rehearsed:
            return 0.0
        return self.planned / self.rehearsed - 1 if self.rehearsed else 1.0


def rehearsal_text(config: Config, world_size: int, rank: int | None = None) -> str:
    """The whole text.

    Args:
        config: a checked configuration.
        world_size: processes of the job, a multiple of those of one model.
        rank: which of them; None: the first of the first and of the last stage.
    """
    config, said = as_rehearsed(config)
    ranks = [rank] if rank is not None else sorted({0, last_stage_rank(config, world_size)})
    lines: list[str] = []
    with _quiet():  # what a run says of this machine is not what is rehearsed
        for one in ranks:
            lines += _rank_lines(config, world_size, one)
    said += [_OPTIMIZER, _UNSEEN]
    if not torch.__version__.startswith(TORCH):
        said.append(f"tested with PyTorch {', '.join(TORCH)}, and this is {torch.__version__}")
    lines += [f"- {line}" for line in said]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("dattn_mcore")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def rehearse_full(config: Config, world_size: int, rank: int) -> Rehearsed:
    """A step of full micro-batches: one, or as many as the interleaved schedule needs."""
    parallel = config.parallel
    packs = [full_pack(config)] * (parallel.pp if parallel.vpp > 1 else 1)
    return rehearse(config, world_size, rank, packs)


def compared(config: Config, rehearsed: Rehearsed) -> tuple[list[Row], list[Row]]:
    """Bytes of memory, and bytes sent in a step by group, beside the planner's.

    Args:
        config: from `as_rehearsed`.
        rehearsed: from `rehearse_full`.
    """
    pack, count = full_pack(config), rehearsed.num_microbatches
    rows = rows_of(config, pack.layouts, len(pack.labels))
    own, copies = rank_rows(config, rows), rehearsed.copies
    state = state_memory(config, rehearsed.stage, copies)
    optimizer = optimizer_bytes(config, rehearsed.stage, copies)[rehearsed.copy]
    working = working_memory(config, rehearsed.stage, own, count, fp8=False)
    at_work = max(working.working, working.logits)
    memory = [
        Row("weights", rehearsed.weights, state.weights, exact=True),
        Row("gradients", rehearsed.gradients, state.gradients, exact=True),
        Row("optimizer states", rehearsed.optimizer, optimizer, exact=True),
        Row("other that stays", rehearsed.other, None),
        Row("activations kept", rehearsed.activations, working.activations),
        Row("logits at once", rehearsed.logits, working.logits),
        Row("most beside states", rehearsed.peak, working.activations + at_work),
    ]
    sent: dict[str, float] = {}
    for one in rehearsed.collectives:
        # Between two stages, Megatron-Core's interleaved schedule sends within the group of all.
        is_sent = one.operation == "send"
        group = "pipeline" if is_sent else _PLANNED.get(one.group, one.group)
        sent[group] = sent.get(group, 0.0) + one.sent
    planned = {
        "tensor": tensor_bytes(config, rehearsed.stage, own) * count,
        "context": context_bytes(config, rehearsed.stage, own) * count,
        "pipeline": pipeline_bytes(config, rehearsed.stage, own, count),
        "data": data_bytes(config, state, copies),
    }
    planned["tensor"] += tower_gradient_bytes(config, rehearsed.stage)
    if rehearsed.stage == 0:
        by_all = tower_ranks(config)[0] > config.parallel.cp
        group = "tensor x context" if by_all else "context"
        planned[group] = planned.get(group, 0.0) + dealt_bytes(config, rows) * count
    exchanged = [Row(name, value, planned.get(name)) for name, value in sent.items() if value]
    return memory, exchanged


def _rank_lines(config: Config, world_size: int, rank: int) -> list[str]:
    rehearsed = rehearse_full(config, world_size, rank)
    memory, exchanged = compared(config, rehearsed)
    parallel, pack = config.parallel, full_pack(config)
    rows = rows_of(config, pack.layouts, 0)
    count = rehearsed.num_microbatches
    micro_batches = "1 micro-batch" if count == 1 else f"{count} micro-batches"
    lines = [
        f"rank {rank} of {world_size} = {sizes_of_replica(config)} x dp {rehearsed.dp}"
        f"{', sequence parallel' if parallel.sp else ''}: pipeline stage {rehearsed.stage}, "
        f"{micro_batches} of {rows.visual:,} visual and {rows.text:,} text rows, all labelled",
        "",
        f"{'bytes on this rank':<24}{'rehearsed':>18}{'planned':>18}{'apart':>9}",
        *map(_line, memory),
        "",
        f"{'bytes it sends, by group':<24}{'rehearsed':>18}{'planned':>18}{'apart':>9}",
        *map(_line, exchanged),
        "",
        f"{'group':<16}{'ranks':>6}  {'collective':<16}{'times':>6}  {'tensor':<30}{'bytes':>16}",
        *_collective_lines(rehearsed.collectives),
        "",
    ]
    return lines


def _line(row: Row) -> str:
    planned = "" if row.planned is None else f"{row.planned:,.0f}"
    apart = "equal" if row.planned == row.rehearsed else f"{row.apart:+.1%}"
    if row.planned is None:
        apart = ""
    return f"{row.name:<24}{row.rehearsed:>18,.0f}{planned:>18}{apart:>9}"


def _collective_lines(collectives: Iterable[Collective]) -> list[str]:
    """A line for all that are alike, by group; without those of a rank with itself."""
    counts: dict[Collective, int] = {}
    for exchange in collectives:
        if exchange.size > 1:
            counts[exchange] = counts.get(exchange, 0) + 1
    groups = list(dict.fromkeys(exchange.group for exchange in counts))
    lines = []
    for exchange, times in sorted(counts.items(), key=lambda item: groups.index(item[0].group)):
        tensor = f"{exchange.dtype} {list(exchange.shape)}"
        lines.append(
            f"{exchange.group:<16}{exchange.size:>6}  {exchange.operation:<16}{times:>6}  "
            f"{tensor:<30}{exchange.nbytes:>16,}"
        )
    return lines
