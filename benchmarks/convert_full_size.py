"""Converts random weights with the exact shapes of Gemma 2 9B and SigLIP so400m, there and back.

    python -m benchmarks.convert_full_size --folder /a/disk/with/40/GB
    python -m benchmarks.convert_full_size --scale small

On two cores it measures, for each direction, the peak anonymous resident memory of each converting
process and the speed (imports included) against copying the same files on the same disk in the same
run; then it compares all weights that came back with what was made, bit by bit. Files are out of
the page cache before each measurement and on the disk (fsync) at its end. Every measurement runs
`--repeats` times, copies and conversions in turn; the medians are compared. Two sets of weights are
on the disk at a time, not more. Exit status 1: a bound was missed.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import Gemma2Config, Gemma2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from dattn_mcore.data.tokenizer import train_tokenizer
from tools.checkpoint_convert.safetensors_folder import SafetensorsWriter

ROOT = Path(__file__).resolve().parents[1]
MEMORY_BOUND = 6 * 2**30  # bytes of anonymous memory per process
SPEED_BOUND = 0.5  # of the speed of copying
CORES = 2
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
SMALL_GEMMA = dict(num_hidden_layers=4, hidden_size=896, intermediate_size=3584, vocab_size=32000)
SMALL_SIGLIP = dict(num_hidden_layers=4)


@dataclass
class Measured:
    """One row of the table.

    Attributes:
        seconds: wall time, imports included.
        anonymous: peak anonymous resident memory of the largest process, bytes; None for a copy.
        nbytes: bytes read.
        processor_seconds: user and system time, of all processes.
        load: load average of the machine over a minute, before and after.
    """

    what: str
    nbytes: int
    seconds: float
    processor_seconds: float
    load: tuple[float, float]
    anonymous: int | None = None

    def row(self) -> str:
        """A line of a Markdown table."""
        memory = "" if self.anonymous is None else f"{self.anonymous / 2**30:.2f}"
        speed = self.nbytes / self.seconds / 1e9
        return (
            f"| {self.what} | {self.nbytes / 1e9:.2f} | {self.seconds:.1f} | {speed:.2f} | "
            f"{self.processor_seconds:.1f} | {memory} | {self.load[0]:.1f}, {self.load[1]:.1f} |"
        )


def main() -> int:
    """Runs everything; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scale", choices=("full", "small"), default="full")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where to work")
    parser.add_argument("--processes", type=int, default=CORES, metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    gemma = GEMMA | (SMALL_GEMMA if options.scale == "small" else {})
    siglip = SIGLIP | (SMALL_SIGLIP if options.scale == "small" else {})
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="convert_") as folder:
        return _run(Path(folder), gemma, siglip, options)


def _run(
    folder: Path, gemma: dict[str, Any], siglip: dict[str, Any], options: argparse.Namespace
) -> int:
    with torch.device("meta"):
        llm = Gemma2ForCausalLM(Gemma2Config(**gemma, dtype="bfloat16"))
        tower = SiglipVisionModel(SiglipVisionConfig(**siglip, dtype="bfloat16"))
    needed = 2 * sum(p.numel() for model in (llm, tower) for p in model.parameters())
    free = shutil.disk_usage(folder).free
    if free < 2.1 * needed:
        sys.stderr.write(
            f"error: {folder.parent} has {free / 1e9:.0f} GB free, {2.1 * needed / 1e9:.0f} GB are "
            "needed; give another --folder\n"
        )
        return 2
    _say(machine(folder))
    started = time.monotonic()
    made = {
        **_random_folder(folder / "llm", llm, drop=("lm_head.weight",)),
        **_random_folder(folder / "vision", tower, drop=()),
    }
    _say(f"random weights: {needed / 1e9:.2f} GB in {time.monotonic() - started:.0f} s")
    train_tokenizer(("a few words", "and a few more of them"), folder / "tokenizer.model")
    (folder / "run.yaml").write_text(_config(gemma, siglip))
    sources = [folder / "llm", folder / "vision"]
    several = ("--processes", options.processes)

    there = [
        *("hf-to-mcore", "--llm", sources[0], "--vision", sources[1], *several),
        *("--config", folder / "run.yaml", folder / "mcore"),
    ]
    back = [
        *("mcore-to-hf", folder / "mcore", folder / "hf", *several),
        *("--tokenizer", folder / "tokenizer.model", "--template", "plain"),
    ]
    rows, missed = [], []
    for title, inputs, command, output in (
        ("hf-to-mcore", sources, there, folder / "mcore"),
        ("mcore-to-hf", [folder / "mcore"], back, folder / "hf"),
    ):
        copies, runs = [], []
        for repeat in range(options.repeats):
            if repeat:
                shutil.rmtree(output)
            copies.append(_measure_copy(title, inputs, folder / "copy"))
            _say(copies[-1].row())
            runs.append(_measure_command(title, inputs, command))
            _say(runs[-1].row())
        rows += [*copies, *runs]
        ratio = _median(copies, "seconds") / _median(runs, "seconds")
        _say(
            f"{title}: processor time {_median(runs, 'processor_seconds'):.0f} s, of the copy "
            f"{_median(copies, 'processor_seconds'):.0f} s"
        )
        peak = max(run.anonymous or 0 for run in runs)
        _say(f"{title}: {ratio:.2f} of the copy's speed, peak {peak / 2**30:.2f} GiB a process")
        if ratio < SPEED_BOUND:
            missed.append(f"{title}: {ratio:.2f} of the copy's speed, bound {SPEED_BOUND}")
        if peak > MEMORY_BOUND:
            missed.append(f"{title}: {peak / 2**30:.2f} GiB, bound {MEMORY_BOUND / 2**30:.0f} GiB")
        for source in inputs:
            shutil.rmtree(source)
    last = f"encoder.layers.{siglip['num_hidden_layers'] - 1}."
    unread = ("head.", "post_layernorm.", last)  # the shipped configuration selects layer -2
    kept = {name: shape for name, shape in made.items() if not name.startswith(unread)}
    different = _compare(kept, folder / "hf")
    _say(
        f"there and back: {len(kept)} tensors, {len(different)} of them not equal to the last bit; "
        f"{len(made) - len(kept)} of the tower's top are left out by rule"
    )
    if different:
        missed.append(f"{len(different)} tensors came back changed, {different[0]} first")
    head = (
        "| | GB | s | GB/s | processor s | peak anonymous GiB a process | load before, after |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    sys.stdout.write(head + "".join(row.row() + "\n" for row in rows))
    if options.scale == "small":
        _say("--scale small tests this script; its times are mostly imports")
        missed = [line for line in missed if "speed" not in line]
    for line in missed:
        _say(f"missed: {line}")
    return 1 if missed else 0


def machine(folder: Path) -> str:
    """What the figures were measured on."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    packages = ("torch", "megatron-core", "transformers", "safetensors")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"{CORES} of {len(names)} cores ({names[0]}), {memory / 2**30:.0f} GiB memory, "
        f"{shutil.disk_usage(folder).free / 1e9:.0f} GB of disk free; "
        f"Python {sys.version.split()[0]}, {versions}"
    )


def _compare(made: dict[str, torch.Size], exported: Path) -> list[str]:
    """Names of tensors that are missing or changed: made anew, and read by the safetensors library.

    Args:
        made: shapes by the names in the folders that were converted.
        exported: what came back.
    """
    places = {}
    for file in exported.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dictionary)
                raw = name.replace("model.language_model.", "model.")
                places[raw.removeprefix("model.vision_tower.")] = (file, name)

    def differs(name: str) -> bool:
        if name not in places:
            return True
        file, exported_name = places[name]
        with safe_open(file, framework="pt") as opened:
            found = opened.get_tensor(exported_name)
        expected = _random(name, made[name])
        return found.dtype != expected.dtype or not torch.equal(
            found.view(torch.int16), expected.view(torch.int16)
        )

    with ThreadPoolExecutor(CORES) as threads:
        return [n for n, bad in zip(made, threads.map(differs, made), strict=True) if bad]


def _random(name: str, shape: torch.Size) -> torch.Tensor:
    """The random bf16 tensor of a name: every finite pattern of bits below 2."""
    numbers = np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))
    count = math.prod(shape)
    bits = numbers.integers(0, 2**64, -(-count // 4), dtype=np.uint64)
    bits &= np.uint64(0xBFFFBFFFBFFFBFFF)  # no infinity, no NaN
    return torch.from_numpy(bits.view(np.int16)[:count]).view(torch.bfloat16).view(shape)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _random_folder(folder: Path, model: Any, drop: tuple[str, ...]) -> dict[str, torch.Size]:
    """Writes random weights of a model's shapes, and returns the shapes by name."""
    model.config.save_pretrained(folder)
    shapes = {name: t.shape for name, t in model.state_dict().items() if name not in drop}
    announced = {name: (tuple(shape), torch.bfloat16) for name, shape in shapes.items()}
    with (
        SafetensorsWriter(folder, announced, 5_000_000_000) as writer,
        ThreadPoolExecutor(CORES) as threads,
    ):
        for _ in threads.map(lambda name: writer.add(name, _random(name, shapes[name])), shapes):
            pass
        writer.close(shapes)
    return shapes


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


def _files(folders: list[Path]) -> list[Path]:
    return sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())


def _forget(files: list[Path]) -> None:
    """Takes files out of the page cache."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _median(rows: list[Measured], field: str) -> float:
    return statistics.median(getattr(row, field) for row in rows)


def _processor_seconds() -> float:
    """Of this process and all that it has waited for, theirs included."""
    return sum(os.times()[:4])


def _measure_copy(title: str, folders: list[Path], target: Path) -> Measured:
    files = _files(folders)
    _forget(files)
    target.mkdir()
    before, started, processor = os.getloadavg()[0], time.monotonic(), _processor_seconds()
    for number, file in enumerate(files):
        copy = target / str(number)
        shutil.copyfile(file, copy)
        with copy.open("rb") as opened:
            os.fsync(opened.fileno())
    seconds = time.monotonic() - started
    processor = _processor_seconds() - processor
    load = (before, os.getloadavg()[0])
    shutil.rmtree(target)
    return Measured(f"copy of the input of {title}", _size(files), seconds, processor, load)


def _measure_command(title: str, folders: list[Path], command: list[Any]) -> Measured:
    files = _files(folders)
    _forget(files)
    before, started, processor = os.getloadavg()[0], time.monotonic(), _processor_seconds()
    peak, _ = _command(command)
    seconds = time.monotonic() - started
    processor = _processor_seconds() - processor
    load = (before, os.getloadavg()[0])
    return Measured(title, _size(files), seconds, processor, load, peak)


def _size(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _command(arguments: list[Any]) -> tuple[int, str]:
    """Runs a command of the converter; its peak anonymous memory and what it printed."""
    command = [sys.executable, "-m", "tools.checkpoint_convert", *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    peak = _watch(process.pid, process.poll)
    out, error = process.communicate()
    if process.returncode not in (0, 1) or not out:
        raise SystemExit(f"{' '.join(command)} failed:\n{error}")
    return peak, out


def _watch(pid: int, finished: Callable[[], Any], interval_seconds: float = 0.02) -> int:
    """The largest RssAnon of a process or one that it forked, in bytes, sampled until it ends."""
    peak = 0
    while finished() is None:
        for process in (pid, *_children(pid)):
            peak = max(peak, _anonymous(process))
        time.sleep(interval_seconds)
    return peak


def _children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except OSError:  # it has just ended
        return []
    return [int(word) for word in text.split()]


def _anonymous(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:  # it has just ended
        return 0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
