"""Time of a training step over questions about one image: its visual rows once, or once a question.

    python -m benchmarks.shared_images
    python -m benchmarks.shared_images --write-docs          # and docs/performance.md's table

One pack of `--questions` samples that show the same image, whose rows are shared or not
(`data.share_images`); forward, backward and optimizer of one model (`benchmarks.steps`). The two
take turns in one process, by the wall clock; the machine should do nothing else. Beside the ratio
of times stands that of operations, counted by PyTorch in a step, and by the closed form. Exit
status 1 on a CPU: with 56 text rows the shared step is less than 3 times as fast, or the ratio of
times is below 0.75 of that of operations.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dattn_mcore.parallel import entry

entry.prepare_imports("gpu")  # Megatron-Core's import dies of a broken package

from benchmarks.count_flops import FLASH
from benchmarks.measure import seconds_in_turn
from benchmarks.results import (
    ROOT,
    add_arguments,
    hand_over,
    markdown_table,
    number_ticks,
    provenance,
    write_section,
)
from benchmarks.steps import SIZES, Step, sized_config, trained_by
from dattn_mcore.config.schema import Config
from dattn_mcore.layers.layout import build_seq_params
from dattn_mcore.models.dattn import ModelInputs
from dattn_mcore.parallel import platform
from dattn_mcore.parallel.groups import single_process
from dattn_mcore.plan.flops import step_work
from dattn_mcore.plan.rows import rows_of
from dattn_mcore.types import IGNORED_LABEL, Layout

FEW_TEXT, AT_LEAST = 56, 3.0  # text rows of a question, and how much faster its step must be
ROWS = ("shared", "apart")
OF_OPERATIONS = 0.75  # share of the operations' ratio that the times' must reach


def questions_about(
    config: Config, layouts: tuple[Layout, ...], images_of: tuple[int, ...], device: torch.device
) -> ModelInputs:
    """A pack of questions about one image, the second half of each supervised.

    Args:
        config: Of the model.
        layouts: Of the samples.
        images_of: All of unit 0, or empty: each has a copy of the image.
        device: Where the tensors go.
    """
    params = build_seq_params(
        layouts,
        t2v_position=config.attention.t2v_position,
        multiple=config.data.pad_multiple,
        device=device,
        images_of=images_of,
    )
    ids = torch.randint(1000, config.model.llm.vocab_size, (params.num_text,), device=device)
    labels, start = torch.full_like(ids, IGNORED_LABEL), 0
    for rows in params.text_lengths:
        labels[start + rows // 2 : start + rows] = ids[start : start + rows - rows // 2]
        start += rows
    per_tile, size = config.model.vision.rows_per_tile, config.model.vision.image_size
    image = (layouts[0][0][1] // per_tile, 3, size, size)
    tiles = torch.randint(0, 256, image, dtype=torch.uint8, device=device)
    return ModelInputs(params, ids, labels, tiles.repeat(len(params.visual_lengths), 1, 1, 1))


def _added(into: Sequence[int], left: Sequence[int], right: Sequence[int], **_: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


# Products that are added into gradients' buffers, which PyTorch's counter does not know.
ADDED = {torch.ops.aten.addmm_: _added}


def counted(step: Step) -> int:
    """Operations of a step, by PyTorch."""
    with FlopCounterMode(display=False, custom_mapping={**FLASH, **ADDED}) as counter:
        step()
    return int(counter.get_total_flops())


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each number of text rows."""
    rows = []
    with single_process(args.device) as groups:
        device = platform.current_device()
        config = sized_config(args.size, args.device, args.layers)
        torch.manual_seed(0)
        step_over = trained_by(config, groups, device)
        for text in args.text:
            layouts = (((True, args.visual), (False, text)),) * args.questions
            steps, closed = {}, {}
            for name in ROWS:
                units = (0,) * args.questions if name == "shared" else ()
                steps[name] = step_over(questions_about(config, layouts, units, device))
                labelled = args.questions * (text - text // 2)
                work = step_work(config, rows_of(config, layouts, labelled, units))
                closed[name] = sum(part.executed for part in work.values())
            rows.append(
                {
                    "text": text,
                    "seconds": seconds_in_turn(steps, args.repeats, device),
                    "counted": {name: counted(step) for name, step in steps.items()},
                    "closed_form": closed,
                }
            )
    return rows


def ratio(of_both: dict[str, float]) -> float:
    """Apart over shared; 0 where one ran out of memory."""
    return of_both["apart"] / of_both["shared"] if len(of_both) == 2 else 0.0


def main(arguments: list[str] | None = None) -> int:
    """Measures and hands over; see the file's docstring."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--layers", type=int, default=None, help="of the language model")
    parser.add_argument("--questions", type=int, default=8, help="about the image")
    parser.add_argument("--visual", type=int, default=576, help="rows of the image")
    parser.add_argument("--text", type=int, nargs="+", default=[56, 150, 250], help="of a question")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--write-docs", action="store_true", help="write docs/performance.md's table"
    )
    args = parser.parse_args(given)
    page = ROOT / "docs" / "performance.md"
    if args.write_docs:
        args.out = page.parent / "performance"
    rows = measure(args)

    def cells(row: dict[str, Any]) -> list[str]:
        seconds = row["seconds"]
        return [
            f"{args.questions} x {row['text']}",
            *(f"{seconds[name]:.3f}" if name in seconds else "no memory" for name in ROWS),
            f"{ratio(seconds):.2f}",
            f"{ratio(row['counted']):.2f}",
            f"{ratio(row['closed_form']):.2f}",
        ]

    table = markdown_table(
        (
            "text rows",
            "rows shared, s",
            "each its own, s",
            "times as fast",
            "in FLOPs, counted",
            "in FLOPs, closed form",
        ),
        map(cells, rows),
    )

    def draw(axes: Any) -> None:
        texts = [row["text"] for row in rows]
        for key, label in (("seconds", "time"), ("counted", "operations")):
            axes.plot(texts, [ratio(row[key]) for row in rows], "o-", label=label)
        axes.set(xlabel="text rows of a question", ylabel="each its own / shared")
        axes.set_title(f"{args.questions} questions on {args.visual} visual rows, {args.size}")
        number_ticks(axes, texts)
        axes.legend()

    hand_over(f"shared-images-{args.size}", args, table, rows, draw)
    if args.write_docs:
        command = shlex.join(["python", "-m", "benchmarks.shared_images", *given])
        picture = f"![shared images](performance/shared-images-{args.size}-{args.device}.png)"
        text = f"{table}\n{provenance(args.device)}; `{command}`\n\n{picture}\n"
        write_section(page, f"shared-images-{args.device}", text)
    missed = any(
        ratio(row["seconds"]) < OF_OPERATIONS * ratio(row["counted"])
        or (row["text"] <= FEW_TEXT and ratio(row["seconds"]) < AT_LEAST)
        for row in rows
    )
    return int(missed and args.device == "cpu")


if __name__ == "__main__":
    sys.exit(main())
