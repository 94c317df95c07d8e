"""Command line: `python -m tools.checkpoint_convert COMMAND ...`; `--help` lists the commands."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import rich.progress
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from dattn_mcore.console import cell, complain, say
from dattn_mcore.errors import CheckpointError, DattnError, error_lines
from dattn_mcore.log import log_to_stderr

if TYPE_CHECKING:
    from tools.checkpoint_convert.workers import Progress


PROGRAM = "checkpoint_convert"


def main(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Runs one command; returns the exit status (1: `verify` found a difference; 2: an error)."""
    options = _parser(prog).parse_args(arguments)
    log_to_stderr()
    # What Megatron-Core says about packages that a conversion does not need.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", message=r"Please use DTensor")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Large pages for PyTorch's memory, before it is imported: page faults cost more than copies.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from dattn_mcore.parallel import entry  # imports PyTorch

    entry.prepare_imports("cpu")
    try:
        return options.run(options) or 0
    except DattnError as error:
        sys.stderr.write(error_lines(error))
        return 2


def _parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Weights between checkpoints of the trainer and Hugging Face folders.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    export = commands.add_parser("mcore-to-hf", help="checkpoint or run folder to Hugging Face")
    export.add_argument("checkpoint", help="checkpoint folder, or a run folder (its newest one)")
    export.add_argument("output", help="folder to make; must not exist")
    export.add_argument("--tokenizer", help="instead of data.tokenizer of the run")
    export.add_argument("--template", help="chat template; instead of data.template")
    export.add_argument(
        "--ema", action="store_true", help="the running mean of the weights (train.ema_decay)"
    )
    export.add_argument(
        "--adapter",
        choices=("merged", "peft"),
        default="merged",
        help="of a run with adapters (lora.targets): a whole model (default), or a folder of peft",
    )
    export.add_argument(
        "--base", metavar="CHECKPOINT", help="of adapters, where that of their base is not any more"
    )
    export.add_argument(
        "--base-model",
        metavar="NAME",
        help="with --adapter peft: exported base model that the folder names",
    )
    _add_processes(export)
    export.add_argument("--max-shard-size", type=_size, default=_size("5GB"), metavar="SIZE")
    export.add_argument(
        "--no-check",
        action="store_true",
        help="do not load what was written and compare it with the trainer at the end",
    )
    export.set_defaults(run=_mcore_to_hf)

    load = commands.add_parser(
        "hf-to-mcore",
        help="exported folder, or language model and tower, to a checkpoint",
        usage="%(prog)s FOLDER OUTPUT | --llm DIR --vision DIR [--config FILE] OUTPUT",
    )
    load.add_argument("folder", nargs="?", help="exported folder")
    load.add_argument("output", help="checkpoint folder to make; must not exist")
    _add_processes(load)
    load.add_argument(
        "--vocab-pad-multiple",
        type=_count,
        default=128,
        metavar="N",
        help="of an exported folder (default 128); with --config its own counts",
    )
    load.add_argument("--llm", metavar="DIR", help="Hugging Face folder of a language model")
    load.add_argument("--vision", metavar="DIR", help="Hugging Face folder of a vision tower")
    load.add_argument("--config", metavar="FILE", help="of the run that starts from the output")
    load.add_argument(
        "--select-layer",
        type=int,
        choices=(-1, -2),
        default=-2,
        help="of the tower, without --config: all layers, or all but the last (default, as LLaVA)",
    )
    load.set_defaults(run=_hf_to_mcore)

    mean = commands.add_parser("average", help="the mean of the weights of several checkpoints")
    mean.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help="a run folder, or checkpoint folders"
    )
    mean.add_argument("output", help="checkpoint folder to make; must not exist")
    mean.add_argument(
        "--last", type=_count, metavar="K", help="newest of the run folder (default: all)"
    )
    mean.add_argument(
        "--dtype",
        choices=("same", "float32"),
        default="same",
        help="of the result (default: that of the checkpoints)",
    )
    mean.add_argument(
        "--ema", action="store_true", help="the running means of the weights (train.ema_decay)"
    )
    mean.set_defaults(run=_average)

    same = commands.add_parser("verify", help="compares two folders or checkpoints, bit by bit")
    same.add_argument("first", help="checkpoint, run folder, exported folder, or a model's own")
    same.add_argument("second", help="the same; a language model or tower is compared alone")
    same.set_defaults(run=_verify)

    renew = commands.add_parser(
        "refresh", help="new code and processor settings for an older export; weights stay"
    )
    renew.add_argument("folder", help="exported folder; changed in place")
    renew.set_defaults(run=_refresh)

    look = commands.add_parser("inspect", help="what a checkpoint or folder holds")
    look.add_argument("path")
    look.add_argument("--tensors", action="store_true", help="list every tensor")
    look.set_defaults(run=_inspect)
    return parser


def _add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes",
        type=_count,
        default=1,
        metavar="N",
        help="how many share the work (default 1); each takes a core and a few tensors of memory",
    )


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number; write for example 2")
    return int(text)


def _size(text: str) -> int:
    """Bytes of `5GB`, `200MB`, `10KB` or a plain number."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, factor = text.upper(), 1
    for unit, size in units.items():
        if number.endswith(unit):
            number, factor = number[: -len(unit)], size
    try:
        size = int(float(number) * factor)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 5GB")
    return size


@contextmanager
def _progress(title: str) -> Iterator[Progress]:
    """A progress bar that appears with the first tensor: not before an error, nor before a fork."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = rich.progress.Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(title, total=None)

    def update(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        if bar.live.is_started:
            bar.stop()


@contextmanager
def _own_modules_cache() -> Iterator[None]:
    """A folder that goes away, for the copies that transformers makes of an export's code.

    It is read when transformers is imported: a process that has done so keeps its own.
    """
    name = "HF_MODULES_CACHE"
    if name in os.environ or "transformers" in sys.modules:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="dattn_modules_") as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            del os.environ[name]


def _mcore_to_hf(options: argparse.Namespace) -> None:
    if options.adapter == "peft":
        from tools.checkpoint_convert.peft_out import write_peft

        for flag in ("tokenizer", "template", "no_check"):  # a folder of peft has none of these
            if getattr(options, flag):
                name = flag.replace("_", "-")
                raise CheckpointError(f"--{name} has no effect with --adapter peft; leave it out")
        what = write_peft(
            options.checkpoint,
            options.output,
            options.base,
            name=options.base_model,
            ema=options.ema,
        )
        say(f"{options.checkpoint} -> {options.output}: {what}")
        return
    if options.base_model is not None:
        raise CheckpointError("--base-model needs --adapter peft")
    with _own_modules_cache():
        from tools.checkpoint_convert.mcore_to_hf import ExportOptions, convert

        chosen = ExportOptions(
            tokenizer=options.tokenizer,
            template=options.template,
            max_shard_bytes=options.max_shard_size,
            processes=options.processes,
            check=not options.no_check,
            ema=options.ema,
            base=options.base,
        )
        with _progress("mcore-to-hf") as progress:
            done = convert(options.checkpoint, options.output, chosen, progress)
    say(f"{done.source} -> {options.output}")
    say(f"{done.checked or 'not checked, because of --no-check'}")


def _average(options: argparse.Namespace) -> None:
    from tools.checkpoint_convert.average import AverageOptions, average

    chosen = AverageOptions(last=options.last, dtype=options.dtype, ema=options.ema)
    with _progress("average") as progress:
        done = average(options.checkpoints, options.output, chosen, progress)
    say(f"mean of {', '.join(map(str, done))} -> {options.output}")


def _hf_to_mcore(options: argparse.Namespace) -> None:
    from dattn_mcore.config.checks import check_config
    from dattn_mcore.config.load import load_config
    from tools.checkpoint_convert.hf_to_mcore import (
        config_of_parts,
        convert,
        convert_parts,
        model_yaml,
        with_own_tokenizer,
    )

    parts = (options.llm, options.vision)
    named = any(parts) or options.config is not None
    if named == (options.folder is not None) or (named and not all(parts)):
        raise CheckpointError(
            "hf-to-mcore takes an exported folder, or --llm and --vision together (and --config)"
        )
    if options.folder is not None:
        with _progress("hf-to-mcore") as progress:
            convert(
                options.folder,
                options.output,
                options.vocab_pad_multiple,
                progress,
                options.processes,
            )
        say(f"{options.folder} -> {options.output}")
        return
    settings = Path(f"{options.output}.yaml")
    if options.config is None:
        if settings.exists():
            raise CheckpointError(f"{settings} exists; name another output, or remove it")
        config = config_of_parts(options.llm, options.vision, options.select_layer)
        config = with_own_tokenizer(config, options.llm)
    else:
        config = load_config(options.config)
        check_config(config)
    with _progress("hf-to-mcore") as progress:
        convert_parts(
            options.llm, options.vision, config, options.output, progress, options.processes
        )
    say(f"{options.llm} + {options.vision} -> {options.output}")
    if options.config is None:
        settings.write_text(model_yaml(config), encoding="utf-8")
        say(f"{settings}: the model's settings, for base: of a run")


def _refresh(options: argparse.Namespace) -> None:
    from tools.checkpoint_convert.refresh import refresh

    lines = refresh(options.folder)
    for line in lines:
        say(f"{line}")
    what = f"{len(lines)} files renewed" if lines else "up to date"
    say(f"{options.folder}: {what}; weights untouched")


def _verify(options: argparse.Namespace) -> int:
    from tools.checkpoint_convert.verify import verify

    with _progress("verify") as progress:
        found = verify(options.first, options.second, progress)
    for line in found.differences:
        say(f"{line}")
    what = f"{found.tensors} tensors, {found.parameters:,} parameters"
    if found.differences:
        say(f"{len(found.differences)} differences; compared: {what}")
        return 1
    if found.logits is not None:
        what += f"; logits on a fixed input differ by {found.logits:.2g} at most"
    say(f"equal to the last bit: {what}")
    return 0


def _inspect(options: argparse.Namespace) -> None:
    from dattn_mcore.architectures import language_model, vision_tower
    from tools.checkpoint_convert.inspect_path import inspect

    found = inspect(options.path)
    model, attention = found.model, found.attention
    table = Table(title=cell(f"{found.kind} {found.path}"), show_header=False)
    if found.step is not None:
        table.add_row("step", str(found.step))
    llm, vision = model.llm, model.vision
    if found.kind != "tower":
        what = f"{language_model(model.family).title} ({model.family})"
        table.add_row("language model", f"{what}, {llm.num_layers} layers of {llm.hidden_size}")
    if found.kind != "language model":
        what = f"{vision_tower(vision.kind).title} ({vision.kind})"
        table.add_row("vision tower", f"{what}, {vision.num_layers} layers, {vision.image_size}px")
    if attention is not None:
        modes = f"v2v {attention.v2v}, t2v_position {attention.t2v_position}"
        table.add_row("attention", f"{modes}, merge {attention.merge}")
        table.add_row("visual positions", str(model.visual_positions).lower())
    kinds = sorted({str(dtype).removeprefix("torch.") for _, dtype in found.tensors.values()})
    table.add_row("tensors", f"{len(found.tensors)} ({', '.join(kinds)})")
    table.add_row("parameters", f"{found.parameters:,}")
    table.add_row("other entries", str(found.other))
    console = Console()
    console.print(table)
    if options.tensors:
        listing = Table("tensor", "shape", "dtype")
        for name, (shape, dtype) in found.tensors.items():
            listing.add_row(cell(name), str(list(shape)), str(dtype).removeprefix("torch."))
        console.print(listing)


def interruptible(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """`main`, ended by Ctrl-C, SIGTERM or SIGHUP with one line; what it had written is removed.

    Only `refresh` changes a folder that was there before, all of its files or none.

    What a library makes of the exception on its way (PyTorch's writer wraps it) does not matter.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    stopped: list[int] = []

    def stop(number: int, _: object) -> None:
        if stopped and number == signal.SIGHUP:  # kernel and shell both send it: let it clean up
            return
        stopped.append(number)
        raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which is how nohup asks to go on
        numbers.append(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, stop)
    try:
        return main(arguments, prog)
    except BaseException:
        if not stopped:
            raise
        left = "nothing is left of it"
        if "refresh" in arguments[:1]:
            left = "the folder is whole, with all of its files renewed or none"
        with suppress(OSError):  # a closed terminal
            complain(f"stopped by {signal.Signals(stopped[0]).name}; {left}")
        return 128 + stopped[0]


def average(arguments: Sequence[str] | None = None, prog: str = f"{PROGRAM} average") -> int:
    """The command `average`, under a name of its own: `dattn average`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return interruptible(["average", *arguments], prog.removesuffix(" average"))


if __name__ == "__main__":
    sys.exit(interruptible())
