"""LoRA beside full fine-tuning: the digits questions, from a model that has read captions only.

    make quickstart                                              # leaves runs/quickstart/pretrain
    python -m benchmarks.lora_digits                             # three seeds, both ways
    python -m benchmarks.lora_digits --trains llm optim.lr=5e-3  # adapters alone, another rate
    python -m benchmarks.lora_digits --write-docs                # and docs/training.md's table

Stage 3 of the quickstart (`configs/digits_instruct.yaml`) is run with all that it trains, and with
the language model frozen beside adapters of `--rank`; both are exported, and answer questions about
digits that no training mosaic shows. The adapters are also exported as a folder of `peft`, loaded
by it on the export of the base, and must give the same answers. Settings at the end of the line are
for the runs with adapters. Exit status 1: one of them is below 90 %, or `peft` answers otherwise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT, markdown_table, provenance, write_section
from dattn_mcore.evaluation.files import read_json_lines

LEAST = 0.9
TARGETS = ("*.{q,k,v,o,gate,up,down}_proj",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, prints the table; see the file's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 7, 1234])
    parser.add_argument(
        "--base", default="runs/quickstart/pretrain", help="run folder; may hold {seed}"
    )
    parser.add_argument("--data", type=Path, default=Path("data/digits"))
    parser.add_argument("--out", type=Path, default=Path("runs/lora_digits"))
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument("--lr", type=float, default=5e-3, help="of the runs with adapters")
    parser.add_argument("--trains", default="projector,llm", help="of the runs with adapters")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--write-docs", action="store_true", help="write docs/training.md's table")
    parser.add_argument("settings", nargs="*", help="section.key=value, of the runs with adapters")
    args = parser.parse_args(arguments)
    rows = []
    for seed in args.seeds:
        row = {"seed": seed, **{way: run(args, seed, way) for way in ("full", "lora")}}
        row["peft"] = same_by_peft(args, seed)
        rows.append(row)
        sys.stdout.write(f"seed {seed}: {row['full']['score']}, LoRA {row['lora']['score']}\n")
        sys.stdout.flush()
    table, problems = summary(args, rows)
    sys.stdout.write(f"\n{table}")
    if args.write_docs:
        write_section(ROOT / "docs" / "training.md", "lora", f"{table}\n{provenance('cpu')}\n")
    for problem in problems:
        sys.stderr.write(f"error: {problem}\n")
    return 1 if problems else 0


def run(args: argparse.Namespace, seed: int, way: str) -> dict[str, Any]:
    """Trains, exports, answers and scores in one way, unless that is done.

    Returns:
        `score` ([right, all]), `seconds` of training, and `learn`, the parameters that learnt.
    """
    folder = (args.out / f"{way}_{seed}").resolve()
    kept = folder / "result.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text("utf-8")))
    settings = [
        f"log.run_dir={folder / 'run'}",
        f"checkpoint.init_from={Path(args.base.format(seed=seed)).resolve()}",
        f"data.annotations={args.data.resolve() / 'instruct.json'}",
        f"data.image_folder={args.data.resolve() / 'images'}",
        f"data.tokenizer={args.data.resolve() / 'tokenizer.model'}",
        f"train.seed={seed}",
        f"train.steps={args.steps}",
    ]
    if way == "lora":
        settings += [
            f"lora.targets={json.dumps(args.targets)}",
            f"lora.rank={args.rank}",
            f"lora.alpha={args.alpha}",
            f"train.trains=[{args.trains}]",
            f"optim.lr={args.lr}",
            *args.settings,
        ]
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
    config = ["--config", "configs/digits_instruct.yaml"]
    started = time.monotonic()
    python(*torchrun, "pretrain_dattn.py", *config, *settings)
    seconds = round(time.monotonic() - started, 1)
    python("tools.checkpoint_convert", "mcore-to-hf", str(folder / "run"), str(folder / "hf"))
    answer(args, folder / "hf", folder / "answers.jsonl")
    score = folder / "score.json"
    python(
        "dattn_mcore.evaluation",
        "score-digits",
        f"--questions={args.data / 'heldout_questions.jsonl'}",
        f"--answers={folder / 'answers.jsonl'}",
        f"--json={score}",
        allowed=(0, 1),
    )
    overall = json.loads(score.read_text("utf-8"))["overall"]
    result = {
        "score": [overall["correct"], overall["total"]],
        "seconds": seconds,
        "learn": learning(folder / "run"),
    }
    kept.write_text(json.dumps(result) + "\n", "utf-8")
    return result


def learning(run_dir: Path) -> int:
    """Parameters that a run trains, by its configuration."""
    from dattn_mcore.config.load import load_config
    from dattn_mcore.training.dry_run import stage_summary

    config = load_config(run_dir / "config.yaml")
    return sum(stage_summary(config, stage)[1] for stage in range(config.parallel.pp))


def same_by_peft(args: argparse.Namespace, seed: int) -> int:
    """Questions that `peft` on the export of the base answers otherwise than the merged export."""
    folder = (args.out / f"lora_{seed}").resolve()
    base, adapter, answers = folder / "base_hf", folder / "peft", folder / "answers_peft.jsonl"
    run_dir, source = folder / "run", Path(args.base.format(seed=seed)).resolve()
    convert = ("tools.checkpoint_convert", "mcore-to-hf")
    if not base.exists():
        template = ("--template", "mistral")  # of the questions; captions have none
        python(*convert, str(source), str(base), *template)
    if not adapter.exists():
        python(*convert, str(run_dir), str(adapter), "--adapter", "peft")
    if not answers.exists():
        answer(args, base, answers, "--adapter", str(adapter))
    ours, theirs = (
        [record["text"] for _, record in read_json_lines(path, "answers")]
        for path in (folder / "answers.jsonl", answers)
    )
    return sum(a != b for a, b in zip(ours, theirs, strict=True))


def answer(args: argparse.Namespace, model: Path, answers: Path, *more: str) -> None:
    """Answers the held-out questions."""
    python(
        "dattn_mcore.evaluation",
        "answer",
        f"--model={model}",
        f"--answers={answers}",
        f"--questions={args.data / 'heldout_questions.jsonl'}",
        f"--image-folder={args.data / 'images'}",
        "--batch-size=100",
        "--max-new-tokens=8",
        *more,
    )


def python(*arguments: str, allowed: tuple[int, ...] = (0,)) -> None:
    """Runs a module in a process of its own.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode not in allowed:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")


def summary(args: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> tuple[str, list[str]]:
    """The table, and what is out of bounds."""
    lines, problems = [], []
    for row in rows:
        cells: list[object] = [row["seed"]]
        for way in ("full", "lora"):
            right, total = row[way]["score"]
            cells.append(f"{right / total:.1%}")
        cells.append(row["peft"])
        lines.append(cells)
        right, total = row["lora"]["score"]
        if right / total < LEAST:
            problems.append(f"seed {row['seed']} reaches {right / total:.1%}, below {LEAST:.0%}")
        if row["peft"]:
            problems.append(f"seed {row['seed']}: peft answers {row['peft']} questions otherwise")
    header = ("seed", "full", f"LoRA rank {args.rank}", "peft differs in")
    table = markdown_table(header, lines)
    full, lora = (rows[0][way]["learn"] for way in ("full", "lora")) if rows else (0, 0)
    table += (
        f"\nFull fine-tuning trains {full:,} parameters, LoRA {lora:,}: adapters at "
        f"`{' '.join(args.targets)}`, and of train.trains=[{args.trains}] what is no language "
        f"model; {args.steps} steps, alpha {args.alpha:g}, peak rate {args.lr:g}. All start from "
        "one model; a seed is that of the order of samples and of the adapters' first values.\n"
    )
    return table, problems


if __name__ == "__main__":
    sys.exit(main())
