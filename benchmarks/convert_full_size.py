"""Converts random weights with the exact shapes of Gemma 2 9B and SigLIP so400m, there and back.

    python -m benchmarks.convert_full_size --folder /a/disk/with/41/GB
    python -m benchmarks.convert_full_size --scale small

On two cores it measures, for each direction, the peak anonymous resident memory of each converting
process and the speed (imports included) against copying the same files on the same disk in the same
run; then it compares all weights that came back with what was made, bit by bit. The check at the
end of mcore-to-hf is left out of these runs; one more run has it, under the bound on memory. Files
are out of the page cache before each measurement and on the disk (fsync) at its end. Every
measurement runs `--repeats` times, copies and conversions in turn; the medians are compared. Two
sets of weights are on the disk at a time, not more. Exit status 1: a bound was missed; 2: it cannot
run here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from benchmarks.measure_command import Measured, measure_command, measure_copy, median
from benchmarks.random_weights import changed, write_folder
from benchmarks.results import ROOT, markdown_table, provenance
from dattn_mcore.data.tokenizer import train_tokenizer

MEMORY_BOUND = 6 * 2**30  # bytes of anonymous memory per process
SPEED_BOUND = 0.5  # of the speed of copying
CORES = 2
NO_CHECK = "--no-check"
GEMMA = dict(
    num_hidden_layers=42,
    hidden_size=3584,
    intermediate_size=14336,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=256,
    vocab_size=256000,
    query_pre_attn_scalar=256,
    sliding_window=4096,
)
SIGLIP = dict(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)
SMALL_GEMMA = dict(num_hidden_layers=2, hidden_size=128, intermediate_size=256, vocab_size=1024)
SMALL_SIGLIP = dict(num_hidden_layers=2)
UNREAD = ("head.", "post_layernorm.")  # of the tower: the shipped configuration selects layer -2
HEADER = ("", "GB", "s", "GB/s", "processor s", "peak anonymous GiB a process", "load around it")


def main() -> int:
    """Runs everything; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scale", choices=("full", "small"), default="full")
    parser.add_argument("--folder", type=Path, default=tempfile.gettempdir(), help="where to work")
    parser.add_argument("--processes", type=int, default=CORES, metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    small = options.scale == "small"
    gemma, siglip = GEMMA | (SMALL_GEMMA if small else {}), SIGLIP | (SMALL_SIGLIP if small else {})
    with torch.device("meta"):
        llm = Gemma2ForCausalLM(Gemma2Config(**gemma, dtype="bfloat16"))
        tower = SiglipVisionModel(SiglipVisionConfig(**siglip, dtype="bfloat16"))
    needed = 2 * sum(p.numel() for model in (llm, tower) for p in model.parameters())
    problem = _unfit(options.folder, int(2.1 * needed))
    if problem:
        sys.stderr.write(f"error: --folder {options.folder}: {problem}\n")
        return 2
    _say(f"{provenance('cpu')}; {CORES} cores used")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="convert_") as name:
        folder, started = Path(name), time.monotonic()
        made = {
            **write_folder(folder / "llm", llm, drop=("lm_head.weight",)),
            **write_folder(folder / "vision", tower, drop=()),
        }
        _say(f"random weights: {needed / 1e9:.2f} GB in {time.monotonic() - started:.0f} s")
        train_tokenizer(("a few words", "and a few more of them"), folder / "tokenizer.model")
        (folder / "run.yaml").write_text(_config(gemma, siglip))
        missed = _there_and_back(folder, options)
        unread = (*UNREAD, f"encoder.layers.{siglip['num_hidden_layers'] - 1}.")
        kept = {n: shape for n, shape in made.items() if not n.startswith(unread)}
        different = changed(kept, folder / "hf")
    _say(
        f"there and back: {len(kept)} tensors, {len(different)} of them not equal to the last bit; "
        f"{len(made) - len(kept)} of the tower's top are left out by rule"
    )
    if different:
        missed.append(f"{len(different)} tensors came back changed, {different[0]} first")
    if small:
        _say("--scale small tests this script; its times are mostly imports")
        missed = [line for line in missed if "speed" not in line]
    for line in missed:
        _say(f"missed: {line}")
    return 1 if missed else 0


def _unfit(folder: Path, nbytes: int) -> str:
    """Why one cannot work in a folder, or nothing."""
    if not folder.is_dir():
        return "is no folder; make it, or give another"
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        return f"has {free / 1e9:.0f} GB free, {nbytes / 1e9:.0f} GB are needed; give another"
    return ""


def _there_and_back(folder: Path, options: argparse.Namespace) -> list[str]:
    """Measures both directions, prints the table, and returns the bounds that were missed."""
    sources = [folder / "llm", folder / "vision"]
    several = ("--processes", options.processes)
    there = [
        "hf-to-mcore",
        "--llm",
        sources[0],
        "--vision",
        sources[1],
        *several,
        "--config",
        folder / "run.yaml",
        folder / "mcore",
    ]
    back = [
        "mcore-to-hf",
        folder / "mcore",
        folder / "hf",
        *several,
        "--tokenizer",
        folder / "tokenizer.model",
        "--template",
        "plain",
        NO_CHECK,
    ]
    rows: list[Measured] = []
    missed = []
    for title, inputs, command, output in (
        ("hf-to-mcore", sources, there, folder / "mcore"),
        ("mcore-to-hf", [folder / "mcore"], back, folder / "hf"),
    ):
        copies, runs = [], []
        for repeat in range(options.repeats):
            if repeat:
                shutil.rmtree(output)
            copies.append(measure_copy(title, inputs, folder / "copy"))
            _say(copies[-1].line())
            runs.append(measure_command(title, inputs, ["tools.checkpoint_convert", *command]))
            _say(runs[-1].line())
        rows += [*copies, *runs]
        missed += _judge(title, copies, runs)
        if NO_CHECK in command:
            checked = [argument for argument in command if argument != NO_CHECK]
            rows += _check_too(f"{title} with its check", inputs, checked, output, runs, missed)
        for source in inputs:
            shutil.rmtree(source)
    _say(markdown_table(HEADER, [row.cells() for row in rows]))
    return missed


def _check_too(
    title: str,
    inputs: list[Path],
    command: list[Any],
    output: Path,
    runs: list[Measured],
    missed: list[str],
) -> list[Measured]:
    """Measures a conversion with its check; says what the check took, and judges its memory."""
    shutil.rmtree(output)
    run = measure_command(title, inputs, ["tools.checkpoint_convert", *command])
    _say(run.line())
    peak, more = run.anonymous or 0, run.seconds - median(runs, "seconds")
    _say(f"{title}: {more:.1f} s more, peak {peak / 2**30:.2f} GiB a process")
    if peak > MEMORY_BOUND:
        missed.append(f"{title}: {peak / 2**30:.2f} GiB, bound {MEMORY_BOUND / 2**30:.0f} GiB")
    return [run]


def _judge(title: str, copies: list[Measured], runs: list[Measured]) -> list[str]:
    """Says what a direction took, and returns the bounds that it missed."""
    ratio = median(copies, "seconds") / median(runs, "seconds")
    peak = max(run.anonymous or 0 for run in runs)
    _say(
        f"{title}: {ratio:.2f} of the copy's speed, peak {peak / 2**30:.2f} GiB a process, "
        f"processor time {median(runs, 'processor_seconds'):.0f} s, of the copy "
        f"{median(copies, 'processor_seconds'):.0f} s"
    )
    missed = []
    if ratio < SPEED_BOUND:
        missed.append(f"{title}: {ratio:.2f} of the copy's speed, bound {SPEED_BOUND}")
    if peak > MEMORY_BOUND:
        missed.append(f"{title}: {peak / 2**30:.2f} GiB, bound {MEMORY_BOUND / 2**30:.0f} GiB")
    return missed


def _say(line: str) -> None:
    sys.stdout.write(line.rstrip() + "\n")
    sys.stdout.flush()


def _config(gemma: dict[str, Any], siglip: dict[str, Any]) -> str:
    """A run's configuration: the shipped one, with the sizes of this scale."""
    sizes = {
        "llm": {
            "num_layers": gemma["num_hidden_layers"],
            "hidden_size": gemma["hidden_size"],
            "ffn_hidden_size": gemma["intermediate_size"],
            "vocab_size": gemma["vocab_size"],
        },
        "vision": {"num_layers": siglip["num_hidden_layers"]},
        "projector": {"ffn_hidden_size": gemma["hidden_size"]},
    }
    return f"base: {ROOT / 'configs/gemma_aln.yaml'}\nmodel: {sizes}\nparallel: {{pp: 1}}\n"


if __name__ == "__main__":
    sys.exit(main())
