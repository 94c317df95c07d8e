"""Questions a second about few images, as POPE asks: with images kept, without, and by LLaVA.

    python -m benchmarks.evaluation_cache                # small model, CPU
    python -m benchmarks.evaluation_cache --write-docs   # and its section of docs/performance.md

18 questions of 20 to 40 tokens an image, 2 new tokens each, in batches of one size; those about an
image stand together. Three models of the same sizes generate from the same prompts and tiles, tower
included: the exported D-Attn model with a `DattnImageCache`, which is empty at the start of each
run, the same model without it, and Hugging Face's `LlavaForConditionalGeneration` with SDPA. Both
D-Attn runs answer all questions. LLaVA, which shares nothing between questions, answers the first
batches only (`--llava-batches`), its rate is that of these, and it is measured once, behind the
others. Those take turns in one process, by the wall clock; the machine should be idle. It takes
about 3 minutes on 2 cores. Exit status 1 on a CPU: the cache changed a token, or a ratio is below
its bound.
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dattn_mcore.parallel import entry

entry.prepare_imports("gpu")  # Megatron-Core's import dies of a broken package

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
from benchmarks.steps import SIZES, llava_model, sized_config
from dattn_mcore.config.schema import Config
from dattn_mcore.hf import DattnConfig, DattnForConditionalGeneration, DattnImageCache
from dattn_mcore.parallel import on_cpu, platform
from dattn_mcore.parallel.groups import single_process
from tools.checkpoint_convert.configs import features_of

NAME, MODULE = "evaluation-cache", "benchmarks.evaluation_cache"
QUESTIONS = 18  # an image, as in POPE
TOKENS = (20, 40)  # of a question
NEW_TOKENS = 2
IMAGE = 7  # the placeholder in the prompts of both
LEAST_PLAIN, LEAST_LLAVA = 4.0, 5.0  # of questions a second
PEERS = ("plain", "llava")
# Columns and rows of the canvas beside an image's base view, by tiles.
GRIDS = {1: (0, 0), 3: (2, 1), 4: (3, 1), 5: (2, 2)}


@dataclass(frozen=True)
class Batch:
    """Questions that are answered at once.

    Attributes:
        prompts: token ids of each question.
        images: which image each is about.
    """

    prompts: list[list[int]]
    images: list[int]


def batches(images: int, size: int, vocabulary: int) -> list[Batch]:
    """All questions, those about an image one after the other."""
    rng = random.Random(0)
    asked = [
        (image, [rng.randrange(1000, vocabulary) for _ in range(rng.randint(*TOKENS))])
        for image in range(images)
        for _ in range(QUESTIONS)
    ]
    return [
        Batch([prompt for _, prompt in part], [image for image, _ in part])
        for part in (asked[i : i + size] for i in range(0, len(asked), size))
    ]


def dattn_model(config: Config, llava: Any) -> DattnForConditionalGeneration:
    """The exported model of LLaVA's sizes, weights at random."""
    made = DattnConfig(
        text_config=llava.config.text_config,
        vision_config=llava.config.vision_config,
        **features_of(config.model),
        projector_hidden_size=config.model.projector.ffn_hidden_size,
        vision_feature_layer=config.model.vision.select_layer,
        image_token_id=IMAGE,
    )
    return DattnForConditionalGeneration(made)


def inputs_of(batch: Batch, placeholders: int, device: torch.device) -> dict[str, Tensor]:
    """Prompts padded on the left, with so many placeholders for an image."""
    rows = [[1] + [IMAGE] * placeholders + prompt for prompt in batch.prompts]
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def answers(
    model: Any, asked: list[dict[str, Tensor]], cache: DattnImageCache | None = None
) -> Iterator[Tensor]:
    """New tokens of each batch."""
    settings: dict[str, Any] = {} if cache is None else {"image_cache": cache}
    for inputs in asked:
        tokens = model.generate(
            **inputs,
            **settings,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        yield tokens[:, inputs["input_ids"].shape[1] :]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each number of visual rows."""
    with single_process(args.device):  # for the clock on a GPU; Megatron-Core computes nothing
        return measure_on(args, platform.current_device())


def measure_on(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The same on a device; generation runs past what makes Megatron-Core run on a CPU."""
    config = sized_config(args.size, args.device, args.layers)
    dtype = torch.bfloat16 if args.device == "gpu" else torch.float32
    torch.manual_seed(0)
    llava = llava_model(config).eval().to(device, dtype)
    dattn = dattn_model(config, llava).eval().to(device, dtype)
    each = config.model.vision.rows_per_tile
    side = config.model.vision.image_size
    rows = []
    for visual in args.visual:
        tiles = visual // each
        if tiles * each != visual or tiles not in GRIDS:
            known = ", ".join(str(number * each) for number in GRIDS)
            raise SystemExit(f"error: --visual {visual} must be one of {known}")
        pixels = torch.randn(args.images, tiles, 3, side, side).to(device, dtype)
        grid = torch.tensor(GRIDS[tiles])
        ours, theirs = [], []
        for batch in batches(args.images, args.batch_size, config.model.llm.vocab_size):
            shown = pixels[batch.images].flatten(0, 1)
            grids = grid.repeat(len(batch.images), 1)
            ours.append({**inputs_of(batch, 1, device), "pixel_values": shown})
            ours[-1]["image_grids"] = grids.to(device)
            theirs.append({**inputs_of(batch, visual, device), "pixel_values": shown})

        def held(asked: list[dict[str, Tensor]] = ours) -> list[Tensor]:
            return list(answers(dattn, asked, DattnImageCache(args.gib * 2**30)))

        def plain(asked: list[dict[str, Tensor]] = ours) -> list[Tensor]:
            return list(answers(dattn, asked))

        theirs = theirs[: args.llava_batches]

        def peer(asked: list[dict[str, Tensor]] = theirs) -> list[Tensor]:
            return list(answers(llava, asked))

        runs = {"cached": on_cpu.natively(held), "plain": on_cpu.natively(plain)}
        llava_run = {"llava": on_cpu.natively(peer)}
        same = torch.equal(torch.cat(runs["cached"]()), torch.cat(runs["plain"]()))
        times: dict[str, float | None] = dict.fromkeys([*runs, *llava_run])  # None: no memory
        times |= seconds_in_turn(runs, args.repeats, device)
        times |= seconds_in_turn(llava_run, 1, device)
        number = sum(len(asked["input_ids"]) for asked in theirs)
        row = {"visual": visual, "asked": args.images * QUESTIONS, "asked_llava": number}
        rows.append({**row, "same": same, **times})
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measures and hands over; see the file's docstring."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--layers", type=int, default=None, help="of the language model")
    parser.add_argument("--visual", type=int, nargs="+", default=[576, 2880])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--gib", type=int, default=4, help="of the image cache")
    parser.add_argument("--llava-batches", type=int, default=1, help="that LLaVA answers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write-docs", action="store_true", help="write docs/performance.md")
    args = parser.parse_args(given)
    page = ROOT / "docs/performance.md"
    if args.write_docs:
        args.out = page.parent / "performance"
    rows = measure(args)

    def rate(row: dict[str, Any], name: str) -> float:
        """Questions a second; 0: too little memory."""
        asked = row["asked_llava"] if name == "llava" else row["asked"]
        return asked / row[name] if row[name] else 0.0

    ratios = {
        name: {
            row["visual"]: rate(row, "cached") / rate(row, name)
            for row in rows
            if rate(row, name) and rate(row, "cached")
        }
        for name in PEERS
    }

    def cells(row: dict[str, Any]) -> list[str]:
        rates = (rate(row, name) for name in ("cached", *PEERS))
        compared = (ratios[name].get(row["visual"]) for name in PEERS)
        return [
            str(row["visual"]),
            *(f"{value:.1f}" if value else "no memory" for value in rates),
            *(f"{value:.1f}" if value else "" for value in compared),
            "yes" if row["same"] else "no",
        ]

    header = (
        "visual rows",
        "D-Attn with the cache, questions/s",
        "without, questions/s",
        "LLaVA, questions/s",
        "with / without",
        "with / LLaVA",
        "same tokens with and without",
    )
    table = markdown_table(header, map(cells, rows))

    def draw(axes: Any) -> None:
        for name, label in (("plain", "D-Attn without the cache"), ("llava", "LLaVA, SDPA")):
            axes.plot(*zip(*ratios[name].items(), strict=True), "o-", label=label)
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set(xlabel="visual rows of an image", ylabel="time of a question, with the cache = 1")
        axes.set_title(f"{QUESTIONS} questions an image, {args.size}, {args.device}")
        number_ticks(axes, args.visual)
        axes.legend()

    hand_over(NAME, args, table, rows, draw)
    if args.write_docs:
        section = f"{NAME}-{args.device}"
        origin = f"{provenance(args.device)}; `{shlex.join(['python', '-m', MODULE, *given])}`"
        picture = f"![{NAME}](performance/{section}.png)"
        ran = (
            f"{args.images} images, {rows[0]['asked']} questions, batches of {args.batch_size}; "
            f"LLaVA: the first {rows[0]['asked_llava']} of these questions. Median of "
            f"{args.repeats} runs, of LLaVA one; each ran once before."
        )
        write_section(page, section, f"{table}\n{ran}\n\n{origin}\n\n{picture}\n")
    missed = not all(row["same"] for row in rows)
    missed |= min(ratios["plain"].values(), default=0.0) < LEAST_PLAIN
    missed |= min(ratios["llava"].values(), default=0.0) < LEAST_LLAVA
    return int(missed and args.device == "cpu")


if __name__ == "__main__":
    sys.exit(main())
