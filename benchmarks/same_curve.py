"""Does the trainer train as plain PyTorch does?

    python -m benchmarks.same_curve                # 50 steps, prints the tables
    python -m benchmarks.same_curve --write-docs   # and writes docs/sameness.md and its picture

The same small model, samples and AdamW in float32, twice: by this trainer (packed, its real data
pipeline and loop, on one process and on tp 2 x pp 2) and outside of Megatron-Core, one sample at a
time (`benchmarks.plain_training`). The baseline's mode against transformers' own
`LlavaForConditionalGeneration`, D-Attn against `benchmarks.plain_dattn`. A second plain run, whose
initial weights differ by 1e-7, shows what rounding alone does. Trains on CPUs, in `--out`. Exit
status 1: a loss differs by more than 1e-4 of it; 2: a run failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import plain_dattn
from benchmarks.plain_training import (
    Caption,
    PlainDattn,
    PlainModel,
    Recipe,
    StockLlava,
    draw_weights,
    llava_config,
    perturbed,
    read_captions,
    train,
)
from benchmarks.results import ROOT, markdown_table, plt, provenance, write_section
from dattn_mcore.architectures.tables import model_table
from dattn_mcore.config.load import from_dict, merge
from dattn_mcore.config.schema import Config
from dattn_mcore.console import say
from dattn_mcore.data.digits import DigitsSizes, prepare_digits
from dattn_mcore.errors import DattnError, error_lines
from dattn_mcore.quickstart.run import make_run_dir
from dattn_mcore.units import duration
from tools.checkpoint_convert.configs import TokenIds, to_hf
from tools.checkpoint_convert.hf_to_mcore import convert
from tools.checkpoint_convert.tables import hf_shapes

STEPS, BATCH = 50, 8
BOUND = 1e-4  # relative, of every loss
PERTURBATION = 1e-7  # relative, of every initial weight
LAYOUTS = {"one process": (1, 1), "tp 2 x pp 2": (2, 2)}
PAGE, PICTURE = ROOT / "docs" / "sameness.md", ROOT / "docs" / "sameness.png"
# The projector's norms have no switch, and LLaVA has none of them: with so large an epsilon a norm
# divides by its root, 1e6, whatever the row, and these weights multiply by as much.
NO_NORM_EPS, NO_NORM_WEIGHT = 1e12, 1e6
IMAGE_TOKEN = 511  # an id of the vocabulary that no caption has
WITHOUT_IMAGE = 8  # every so many samples have no image
TOWER = {
    "image_size": 56,
    "patch_size": 14,
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
}
COMMON: dict[str, Any] = {
    "model": {
        "family": "mistral",
        "llm": {
            "num_layers": 4,
            "hidden_size": 128,
            "ffn_hidden_size": 352,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "head_dim": 32,
            "vocab_size": 512,
            "sliding_window": None,
        },
        "projector": {"ffn_hidden_size": 128},
    },
    "data": {"template": "plain", "prepare": "none", "image_backend": "pillow"},
    "optim": {
        "lr": 2e-3,
        "min_lr_ratio": 0.1,
        "warmup_ratio": 0.1,
        "weight_decay": 0.1,
        "clip_grad": 1.0,
    },
    "train": {"precision": "fp32", "global_batch_size": BATCH, "device": "cpu", "seed": 1234},
    "checkpoint": {"save_interval": 100_000},
    "log": {"interval": 1, "tensorboard": False},
}


@dataclass(frozen=True)
class Mode:
    """One comparison.

    Attributes:
        title: of tables and picture.
        settings: of the trainer, beside `COMMON`.
    """

    title: str
    settings: dict[str, Any]


MODES = {
    "llava": Mode(
        "baseline and LlavaForConditionalGeneration",
        {
            "model": {
                "visual_positions": False,
                "vision": {
                    **TOWER,
                    "kind": "clip",
                    "activation": "quick_gelu",
                    "select_layer": -2,
                    "norm_eps": 1e-5,
                },
                "projector": {"norm_eps": NO_NORM_EPS},
            },
            "attention": {"v2v": "causal", "t2v_position": "rope", "merge": "alpha"},
            "data": {
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
            },
        },
    ),
    "dattn": Mode(
        "D-Attn and benchmarks/plain_dattn.py",
        {
            "model": {"vision": {**TOWER, "kind": "siglip"}},
            "attention": {"v2v": "diagonal", "t2v_position": "none", "merge": "alpha"},
        },
    ),
}


@dataclass(frozen=True)
class Start:
    """What both sides start from.

    Attributes:
        tree: settings of the trainer, all but its run folder and layout.
        config: the same, as the trainer understands them.
        weights: by the names of an exported folder, those that both models have.
        captions: all samples, as the plain side reads them.
    """

    tree: dict[str, Any]
    config: Config
    weights: dict[str, Tensor]
    captions: dict[str, Caption]


@dataclass(frozen=True)
class Curve:
    """Loss and gradient norm of every step."""

    losses: list[float]
    norms: list[float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, compares, prints the tables; see the file's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.same_curve", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/same_curve"))
    parser.add_argument("--write-docs", action="store_true", help="write page and picture")
    args = parser.parse_args(arguments)
    out, started = args.out.resolve(), time.monotonic()
    torch.set_num_threads(1)
    try:
        make_run_dir(out, {"made_by": "benchmarks.same_curve"})
        data = prepare_data(out / "data", args.steps * BATCH)
        curves = {
            name: all_curves(name, make_start(name, data, out / name, args.steps), out / name)
            for name in MODES
        }
    except DattnError as error:
        sys.stderr.write(error_lines(error))
        return 2
    text, problems = report(curves)
    command = "python -m benchmarks.same_curve"
    origin = f"{provenance('cpu')}; {duration(time.monotonic() - started)}; `{command}`"
    sys.stdout.write(f"\n{text}{origin}\n")
    kept = {name: {run: vars(curve) for run, curve in of.items()} for name, of in curves.items()}
    (out / "curves.json").write_text(json.dumps({"origin": origin, "curves": kept}) + "\n", "utf-8")
    draw(curves, out / "sameness.png")
    if args.write_docs:
        picture = f"![Loss curves of both, and their differences]({PICTURE.name})"
        write_section(PAGE, "curves", f"{picture}\n\n{text}{origin}\n")
        draw(curves, PICTURE)
    for problem in problems:
        sys.stderr.write(f"error: {problem}\n")
    return 1 if problems else 0


def prepare_data(folder: Path, count: int) -> Path:
    """Captions of handwritten digits; every eighth is left without its image.

    Returns:
        The folder, with `captions.json`.
    """
    prepare_digits(folder, DigitsSizes(align=4, pretrain=count, instruct=4, heldout=4))
    records = json.loads((folder / "pretrain.json").read_text("utf-8"))
    for record in records[WITHOUT_IMAGE - 1 :: WITHOUT_IMAGE]:
        del record["image"]
        record["conversations"][0]["value"] = "Say digits."
    (folder / "captions.json").write_text(json.dumps(records, indent=1) + "\n", "utf-8")
    return folder


def make_start(
    mode: str,
    data: Path,
    folder: Path,
    steps: int,
    more: dict[str, Any] | None = None,
) -> Start:
    """Draws weights and writes them as a checkpoint of the trainer, by its converter.

    Args:
        mode: key of `MODES`.
        data: from `prepare_data`.
        folder: to make; gets `hf` (an exported folder) and `start` (the checkpoint).
        steps: of every run.
        more: settings beside the mode's.
    """
    files = {
        "annotations": str(data / "captions.json"),
        "image_folder": str(data / "images"),
        "tokenizer": str(data / "tokenizer.model"),
        # Packs of three images at most, so that a step has several.
        "text_budget": 96,
        "visual_budget": 48,
    }
    tree = merge(COMMON, MODES[mode].settings)
    tree = merge(tree, {"data": files, "train": {"steps": steps}})
    tree = merge(tree, {"checkpoint": {"init_from": str(folder / "start")}})
    tree = merge(tree, more or {})
    config = from_dict(tree)
    shapes = hf_shapes(model_table(config.model))
    weights = draw_weights(shapes, seed=config.train.seed)
    shared = dict(weights)
    if mode == "llava":
        for name in shapes:
            if "multi_modal_projector" in name and "norm" in name:
                weights[name] = torch.full(shapes[name], NO_NORM_WEIGHT)
                del shared[name]
            elif "position_embedding" in name:
                weights[name] = shared[name] = torch.zeros(shapes[name])
    (folder / "hf").mkdir(parents=True)
    ids = TokenIds(bos=1, eos=2, pad=0, image=IMAGE_TOKEN, stop=(2,))
    to_hf(config.model, config.attention, ids, torch.float32).save_pretrained(folder / "hf")
    save_file(weights, folder / "hf" / "model.safetensors", metadata={"format": "pt"})
    pixels = {"image_mean": config.data.image_mean, "image_std": config.data.image_std}
    (folder / "hf" / "processor_config.json").write_text(json.dumps(pixels), "utf-8")
    convert(folder / "hf", folder / "start")
    captions = read_captions(
        data / "captions.json",
        data / "images",
        data / "tokenizer.model",
        config.data.image_mean,
        config.data.image_std,
    )
    assert not any((sample.ids == IMAGE_TOKEN).any() for sample in captions.values())
    return Start(tree=tree, config=config, weights=shared, captions=captions)


def all_curves(mode: str, start: Start, folder: Path) -> dict[str, Curve]:
    """Trains with the trainer in every layout, then twice without it."""
    curves = {}
    for layout, (tp, pp) in LAYOUTS.items():
        run_dir = folder / f"tp{tp}_pp{pp}"
        settings = {"parallel": {"tp": tp, "pp": pp}, "log": {"run_dir": str(run_dir)}}
        run_trainer(merge(start.tree, settings), folder / f"tp{tp}_pp{pp}.yaml")
        curves[layout] = read_curve(run_dir)
        say(f"{mode}: trainer, {layout}")
    batches = read_batches(folder / "tp1_pp1", start.captions)
    for layout, (tp, pp) in LAYOUTS.items():
        same = read_batches(folder / f"tp{tp}_pp{pp}", start.captions)
        assert [list(map(id, b)) for b in same] == [list(map(id, b)) for b in batches], layout
    curves["plain"] = plain_curve(mode, start, batches, start.weights)
    say(f"{mode}: plain")
    moved = perturbed(start.weights, PERTURBATION, seed=1)
    curves["perturbed"] = plain_curve(mode, start, batches, moved)
    say(f"{mode}: plain, perturbed")
    return curves


def run_trainer(tree: dict[str, Any], file: Path) -> None:
    """Runs `pretrain_dattn.py` with settings; it starts the processes that they need.

    Raises:
        DattnError: it failed.
    """
    file.write_text(yaml.safe_dump(tree, sort_keys=False), "utf-8")
    command = [sys.executable, "pretrain_dattn.py", "--config", str(file)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]
        raise DattnError(f"{' '.join(command)} ended with status {done.returncode}: {last}")


def read_curve(run_dir: Path) -> Curve:
    """What the trainer wrote of every step."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return Curve([row["loss"] for row in rows], [row["grad_norm"] for row in rows])


def read_batches(run_dir: Path, captions: dict[str, Caption]) -> list[list[Caption]]:
    """The samples of every step of a run, in its order."""
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert not any(row[left] for row in rows for left in ("skipped", "truncated", "masked"))
    return [[captions[name] for name in row["ids"]] for row in rows]


def plain_curve(
    mode: str, start: Start, batches: Sequence[Sequence[Caption]], weights: dict[str, Tensor]
) -> Curve:
    """Trains outside of Megatron-Core."""
    optim = start.config.optim
    recipe = Recipe(
        steps=len(batches),
        lr=optim.lr,
        min_lr_ratio=optim.min_lr_ratio,
        warmup_ratio=optim.warmup_ratio,
        weight_decay=optim.weight_decay,
        beta1=optim.beta1,
        beta2=optim.beta2,
        eps=optim.eps,
        clip_grad=optim.clip_grad,
    )
    losses, norms = zip(
        *train(plain_model(mode, start.config, weights), batches, recipe), strict=True
    )
    return Curve(list(losses), list(norms))


def plain_model(mode: str, config: Config, weights: dict[str, Tensor]) -> PlainModel:
    """The model outside of this project, of the same sizes."""
    llm, vision = config.model.llm, config.model.vision
    if mode == "dattn":
        sizes = plain_dattn.Sizes(
            layers=llm.num_layers,
            heads=llm.num_attention_heads,
            head_dim=llm.head_dim,
            tower_layers=vision.num_layers,
            tower_heads=vision.num_attention_heads,
            patch=vision.patch_size,
        )
        return PlainDattn(weights, sizes)
    text = {
        "vocab_size": llm.vocab_size,
        "hidden_size": llm.hidden_size,
        "intermediate_size": llm.ffn_hidden_size,
        "num_hidden_layers": llm.num_layers,
        "num_attention_heads": llm.num_attention_heads,
        "num_key_value_heads": llm.num_query_groups,
        "head_dim": llm.head_dim,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    }
    tower = {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    return StockLlava(weights, llava_config(text, tower, IMAGE_TOKEN))


def differences(losses: Sequence[float], plain: Sequence[float]) -> list[float]:
    """Of every step, relative to the plain loss."""
    return [abs(a - b) / abs(b) for a, b in zip(losses, plain, strict=True)]


def report(curves: dict[str, dict[str, Curve]]) -> tuple[str, list[str]]:
    """Tables, and what is out of bounds."""
    text, problems = "", []
    others = (*LAYOUTS, "perturbed")
    for name, of in curves.items():
        apart = {run: differences(of[run].losses, of["plain"].losses) for run in others}
        norms = {run: differences(of[run].norms, of["plain"].norms) for run in others}
        steps = len(of["plain"].losses)
        shown = [1, *range(5, steps, 5), steps] if steps > 5 else range(1, steps + 1)
        rows = [
            (step, f"{of['plain'].losses[step - 1]:.6f}")
            + tuple(f"{apart[run][step - 1]:.1e}" for run in others)
            for step in shown
        ]
        rows.append(("largest of all steps", "", *(f"{max(apart[run]):.1e}" for run in others)))
        rows.append(("the same, gradient norm", "", *(f"{max(norms[run]):.1e}" for run in others)))
        header = ("step", "plain loss", *LAYOUTS, f"plain, weights x (1 + {PERTURBATION:.0e})")
        text += f"**{MODES[name].title}**: relative differences from the plain loss\n\n"
        text += markdown_table(header, rows) + "\n"
        for layout in LAYOUTS:
            beyond = [step for step, x in enumerate(apart[layout], 1) if not x <= BOUND]
            if beyond:
                problems.append(
                    f"{name}, {layout}: the loss of step {beyond[0]} differs from the plain one by "
                    f"{apart[layout][beyond[0] - 1]:.1e} of it, more than {BOUND:.0e}"
                )
    return text, problems


def draw(curves: dict[str, dict[str, Curve]], path: Path) -> None:
    """Both curves above, the differences below, a column for each comparison."""
    figure, axes = plt.subplots(
        2, len(curves), figsize=(11, 6.2), layout="constrained", sharex=True, squeeze=False
    )
    colours = dict(zip((*LAYOUTS, "perturbed"), ("#3b6fb6", "#d97a1e", "#8a9bb0"), strict=True))
    for column, (name, of) in enumerate(curves.items()):
        steps = range(1, len(of["plain"].losses) + 1)
        above, below = axes[0][column], axes[1][column]
        above.plot(
            steps, of["plain"].losses, color="#1f2933", linewidth=4, alpha=0.3, label="plain"
        )
        for run, colour in colours.items():
            label = f"plain, weights x (1 + {PERTURBATION:.0e})" if run == "perturbed" else run
            apart = differences(of[run].losses, of["plain"].losses)
            below.semilogy(steps, [max(x, 1e-9) for x in apart], color=colour, label=label)
            if run != "perturbed":
                style = "-" if run == "one process" else "--"
                above.plot(steps, of[run].losses, style, color=colour, linewidth=1.2, label=run)
        below.axhline(BOUND, color="#c2362b", linewidth=0.8, linestyle=":", label="bound")
        above.set_title(MODES[name].title, fontsize=10)
        above.set_ylabel("loss")
        below.set_ylabel("relative difference from plain")
        below.set_xlabel("step")
        below.set_ylim(5e-10, 1e-3)
        for one in (above, below):
            one.legend(fontsize=8, frameon=False)
            one.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
