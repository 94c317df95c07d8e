"""Peak memory of one training step over the number of visual rows, with and without recompute.

    python -m benchmarks.peak_memory                            # 16 small layers, CPU
    python -m benchmarks.peak_memory --device gpu --size mistral --layers 8

Counted is what tensors take at the worst moment of forward, backward and optimizer, beyond weights,
gradient buffers and optimizer state, which all have before. Exit status 1: with 8,192 visual rows
and 16 layers or more, the chunked recompute needs more than a third of the plain path.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch

from dattn_mcore.parallel import entry

entry.prepare_imports("gpu")  # Megatron-Core's import dies of a broken package

from megatron.core.process_groups_config import ProcessGroupCollection

from benchmarks.measure import peak_bytes
from benchmarks.results import add_arguments, hand_over, markdown_table, number_ticks
from benchmarks.steps import BASELINE, SIZES, Step, llava_step, our_step, sized_config
from dattn_mcore.parallel import platform
from dattn_mcore.parallel.groups import single_process

BOUND = 1 / 3
TOWER = {"model": {"vision": {"image_size": 448}}}  # 1,024 visual rows an image


def variants(
    args: argparse.Namespace, groups: ProcessGroupCollection
) -> dict[str, Callable[[], dict[int, Step]]]:
    """What is measured, each built when its turn comes."""

    def ours(**sections: Any) -> Callable[[], dict[int, Step]]:
        config = sized_config(args.size, args.device, args.layers, **TOWER, **sections)
        return lambda: our_step(config, groups, device, args.visual, args.text)

    device = platform.current_device()
    llava = sized_config(args.size, args.device, args.layers, **TOWER)
    chunk = {"recompute_visual_chunk": args.chunk}
    return {
        "D-Attn": ours(),
        "D-Attn, full recompute": ours(train={"recompute": "full"}),
        f"D-Attn, visual chunks of {args.chunk}": ours(train=chunk),
        "the same and full recompute": ours(train={**chunk, "recompute": "full"}),
        "baseline": ours(**BASELINE),
        "LLaVA, SDPA": lambda: llava_step(llava, device, args.visual, args.text),
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each variant; None where the device had too little memory."""
    rows = []
    with single_process(args.device) as groups:
        for name, build in variants(args, groups).items():
            steps = build()
            peaks: dict[int, int | None] = {}
            for visual, step in steps.items():
                try:
                    if not peaks:
                        step()  # the optimizer's state exists from here on
                    peaks[visual] = peak_bytes(step, platform.current_device())
                except torch.OutOfMemoryError:
                    peaks[visual] = None
            rows.append({"variant": name, "peaks": peaks})
            del steps, step
            gc.collect()
            platform.empty_cache()
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measures and hands over; see the file's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--layers", type=int, default=None, help="of the language model")
    parser.add_argument("--text", type=int, default=64)
    parser.add_argument("--visual", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--chunk", type=int, default=256, help="visual rows computed at a time")
    args = parser.parse_args(arguments)
    rows = measure(args)
    plain, chunked = rows[0]["peaks"], rows[2]["peaks"]

    def cell(peaks: dict[int, int | None], visual: int) -> str:
        peak, reference = peaks[visual], plain[visual]
        if peak is None:
            return "too much"
        ratio = f" ({peak / reference:.2f})" if reference else ""
        return f"{peak / 2**20:.0f}{ratio}"

    table = markdown_table(
        ("MiB (of D-Attn plain)", *(f"V = {visual}" for visual in args.visual)),
        ((row["variant"], *(cell(row["peaks"], visual) for visual in args.visual)) for row in rows),
    )

    def draw(axes: Any) -> None:
        for row in rows:
            points = [(v, peak / 2**20) for v, peak in row["peaks"].items() if peak is not None]
            axes.plot(*zip(*points, strict=True), "o-", label=row["variant"])
        axes.set(xlabel="visual rows", ylabel="peak of a step, MiB", xscale="log", yscale="log")
        number_ticks(axes, args.visual)
        axes.set_title(f"peak memory, {args.size}, chunks of {args.chunk}, {args.device}")
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))

    hand_over(f"peak-memory-{args.size}", args, table, rows, draw)
    layers = sized_config(args.size, args.device, args.layers).model.llm.num_layers
    judged = layers >= 16 and plain.get(8192) and chunked.get(8192)
    return int(bool(judged) and chunked[8192] > BOUND * plain[8192])


if __name__ == "__main__":
    sys.exit(main())
