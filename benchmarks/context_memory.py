"""Peak memory and tower time of a rank's training step over context parallel ranks.

    python -m benchmarks.context_memory
    python -m benchmarks.context_memory --write-docs         # and docs/context-parallel.md's table

One pack of `--visual` rows before `--text` rows, shared by 1, 2, 4 processes of this machine's CPU,
in turn. Tower, projector and language model learn. Counted is what tensors take at the worst moment
of forward, backward and optimizer, beyond weights, gradient buffers and optimizer state, on the
rank that takes most; and the processor seconds of the vision tower there, forward and backward, in
a step of its own. Exit status 1: with the most ranks, peak or
seconds of a rank are above `--at-most` of those of one process, times 4 / ranks.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from typing import Any

from dattn_mcore.parallel import entry

entry.prepare_imports("cpu")

import torch
import torch.distributed as dist

from benchmarks.cpu_ranks import on_ranks
from benchmarks.measure import peak_bytes
from benchmarks.results import (
    ROOT,
    add_arguments,
    hand_over,
    markdown_table,
    provenance,
    write_section,
)
from benchmarks.steps import sized_config, trained_by
from dattn_mcore.config.schema import Config
from dattn_mcore.data.batch import MicroBatch
from dattn_mcore.parallel.groups import initialize_model_parallel
from dattn_mcore.training.inputs import to_model_inputs, with_own_tiles
from dattn_mcore.types import IGNORED_LABEL

MEMORY, SECONDS = 0.3, 0.28  # shares of one process that four ranks may take


def pack(config: Config, visual: int, text: int) -> MicroBatch:
    """One sample: images of a tile each, then text, whose second half is supervised."""
    generator = torch.Generator().manual_seed(0)
    size, per_tile = config.model.vision.image_size, config.model.vision.rows_per_tile
    if visual % per_tile:
        raise SystemExit(f"--visual {visual}: must be a multiple of a tile's {per_tile} rows")
    tiles = visual // per_tile
    ids = torch.randint(1000, config.model.llm.vocab_size, (text,), generator=generator)
    labels = ids.clone()
    labels[: text // 2] = IGNORED_LABEL
    return MicroBatch(
        layouts=(((True, visual), (False, text)),),
        text_ids=ids,
        labels=labels,
        num_tiles=tiles,
        tiles=torch.randint(0, 256, (tiles, 3, size, size), dtype=torch.uint8, generator=generator),
        sample_ids=("0",),
        num_samples=1,
    )


def run_rank(args: argparse.Namespace) -> tuple[int, float, int]:
    """Peak bytes of a step on this rank, seconds of its tower, and its visual rows."""
    ranks, device = dist.get_world_size(), torch.device("cpu")
    config = sized_config(
        args.size,
        "cpu",
        args.layers,
        parallel={"cp": ranks},
        model={"vision": {"image_size": args.image_size}},
        train={"trains": ["vision", "projector", "llm"]},
    )
    groups = initialize_model_parallel(seed=1, cp=ranks)
    whole = pack(config, args.visual, args.text)
    inputs = to_model_inputs(with_own_tiles(whole, groups), config, groups, device)
    clock = TowerClock()
    step = trained_by(config, groups, device, lambda model: clock.watch(model.vision))(inputs)
    step()  # the optimizer's state exists from here on
    clock.restart()
    step()
    tower = clock.seconds
    return peak_bytes(step, device), tower, inputs.params.num_visual


class TowerClock:
    """Processor seconds of a tower's forward and backward pass.

    Backward lasts from the gradient of its output to the last gradient of its parameters: nothing
    else is behind it.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Back to 0."""
        self._forward, self._output_at, self._last_at = 0.0, 0.0, 0.0

    @property
    def seconds(self) -> float:
        """Since the restart, of one pass."""
        assert self._last_at > self._output_at > 0
        return self._forward + self._last_at - self._output_at

    def watch(self, tower: torch.nn.Module) -> None:
        """Watches a tower whose parameters learn."""
        tower.register_forward_pre_hook(self._before)
        tower.register_forward_hook(self._after)
        for parameter in tower.parameters():
            parameter.register_hook(self._gradient)

    def _before(self, *_: Any) -> None:
        self._forward -= time.process_time()

    def _after(self, _: torch.nn.Module, __: Any, output: torch.Tensor) -> None:
        self._forward += time.process_time()
        output.register_hook(self._output)

    def _output(self, _: torch.Tensor) -> None:
        self._output_at = time.process_time()

    def _gradient(self, _: torch.Tensor) -> None:
        self._last_at = time.process_time()


def measure(ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    """The worst rank of a group."""
    peaks, towers, visual = zip(*on_ranks(run_rank, ranks, args=args), strict=True)
    return {"ranks": ranks, "peak": max(peaks), "tower": max(towers), "visual": visual[0]}


def main(arguments: list[str] | None = None) -> int:
    """Measures and hands over; see the file's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--size", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--layers", type=int, default=2, help="of the language model")
    parser.add_argument("--image-size", type=int, default=448)
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--visual", type=int, default=65_536)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--write-docs", action="store_true", help="docs/context-parallel.md too")
    args = parser.parse_args(arguments)
    rows = []
    for ranks in args.ranks:
        rows.append(measure(ranks, args))
    one, most = rows[0], rows[-1]
    table = markdown_table(
        ("cp", "visual rows of a rank", "peak of a rank, MiB", "of cp 1", "tower, s", "of cp 1"),
        (
            (
                row["ranks"],
                f"{row['visual']:,}",
                f"{row['peak'] / 2**20:,.0f}",
                f"{row['peak'] / one['peak']:.2f}",
                f"{row['tower']:.2f}",
                f"{row['tower'] / one['tower']:.2f}",
            )
            for row in rows
        ),
    )

    def draw(axes: Any) -> None:
        ticks = [row["ranks"] for row in rows]
        axes.plot(ticks, [row["peak"] / one["peak"] for row in rows], "o-", label="peak memory")
        axes.plot(ticks, [row["tower"] / one["tower"] for row in rows], "s-", label="tower time")
        axes.plot(ticks, [1 / ranks for ranks in ticks], ":", color="grey", label="1 / ranks")
        axes.set(xlabel="context parallel ranks", ylabel="of one process", ylim=(0, 1.05))
        axes.set_xticks(ticks)
        axes.set_title(f"a rank's step, V = {args.visual:,}, T = {args.text}")
        axes.legend()

    hand_over("context-memory", args, table, rows, draw)
    if args.write_docs:
        command = "python -m benchmarks.context_memory " + shlex.join(arguments or sys.argv[1:])
        write_section(
            ROOT / "docs" / "context-parallel.md",
            "context-memory",
            f"{table}\n`{command.strip()}`: {provenance('cpu')}.\n",
        )
    scale = 4 / most["ranks"]
    too_much = most["peak"] > MEMORY * scale * one["peak"]
    return int(too_much or most["tower"] > SECONDS * scale * one["tower"])


if __name__ == "__main__":
    sys.exit(main())
