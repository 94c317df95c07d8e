"""`python -m dattn_mcore.data COMMAND`: makes, indexes, checks and shows data sets."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dattn_mcore.config.checks import check_config
from dattn_mcore.config.load import load_config
from dattn_mcore.config.schema import Config
from dattn_mcore.console import say
from dattn_mcore.data.tokenizer import Tokenizer, load_tokenizer
from dattn_mcore.errors import DattnError, error_lines
from dattn_mcore.log import log_to_stdout

PROGRAM = "python -m dattn_mcore.data"


def main(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Runs the command; returns the exit status (2: a mistake, 1: `check` found something)."""
    chosen = _parse(arguments, prog)
    log_to_stdout()
    try:
        return int(chosen.run(chosen))
    except DattnError as error:
        sys.stderr.write(error_lines(error))
        return 2


def _parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """Settings may stand between flags, which argparse's commands do not know by themselves."""
    parser = _parser(prog)
    chosen, rest = parser.parse_known_args(arguments)
    if "overrides" not in chosen or not all("=" in item and item[0] != "-" for item in rest):
        parser.parse_args(arguments)  # says what is unknown
    else:
        chosen.overrides += rest
    return chosen


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description="Makes, indexes, checks and shows data sets."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare-digits", help="write the embedded digits data set")
    prepare.add_argument("--output", default="data/digits", help="folder to make")
    prepare.add_argument("--seed", type=int, help="of every choice")
    prepare.set_defaults(run=_prepare_digits)
    prepare = commands.add_parser(
        "prepare-video-digits", help="write the embedded data set of digits videos"
    )
    prepare.add_argument("--output", default="data/video_digits", help="folder to make")
    prepare.add_argument("--seed", type=int, help="of every choice")
    prepare.set_defaults(run=_prepare_video_digits)
    for name, run, meaning in (
        ("index", _index, "make the index of a configuration's data; goes on where it stopped"),
        ("check", _check, "list what is missing, broken or too long, before a GPU is rented"),
        ("stats", _stats, "write a page of lengths, images, tiles and packing"),
        ("preview", _preview, "write a page of samples as the model sees them"),
    ):
        command = commands.add_parser(name, help=meaning, description=meaning)
        command.add_argument("--config", help="YAML file (default: the embedded digits task)")
        command.add_argument(
            "--workers", type=int, default=os.cpu_count() or 1, help="processes that make the index"
        )
        command.set_defaults(run=run)
        if name == "index":
            command.add_argument("--again", action="store_true", help="even if it is there")
        if name == "check":
            command.add_argument("--decode", action="store_true", help="decode every image as well")
            command.add_argument("--report", type=Path, help="JSON lines of everything found")
        if name in ("stats", "preview"):
            command.add_argument("--output", type=Path, default=Path(f"{name}.html"))
        if name == "stats":
            command.add_argument(
                "--dp", type=int, default=1, help="data parallel ranks to pack for"
            )
        if name == "preview":
            command.add_argument(
                "--samples", type=int, default=20, help="samples, in order of steps"
            )
            command.add_argument("--id", action="append", help="show this sample (repeatable)")
        command.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser


def _prepare_digits(chosen: argparse.Namespace) -> int:
    from dattn_mcore.data.digits import DigitsSizes, prepare_digits

    seed = DigitsSizes.seed if chosen.seed is None else chosen.seed
    folder = prepare_digits(chosen.output, DigitsSizes(seed=seed))
    say(f"digits data set: {folder}")
    return 0


def _prepare_video_digits(chosen: argparse.Namespace) -> int:
    from dattn_mcore.data.video_digits import VideoDigitsSizes, prepare_video_digits

    seed = VideoDigitsSizes.seed if chosen.seed is None else chosen.seed
    folder = prepare_video_digits(chosen.output, VideoDigitsSizes(seed=seed))
    say(f"digits videos: {folder}")
    return 0


def _configured(chosen: argparse.Namespace) -> tuple[Config, Tokenizer]:
    config = load_config(chosen.config, chosen.overrides)
    check_config(config)
    from dattn_mcore.data.digits import prepare_configured

    prepare_configured(config)
    return config, load_tokenizer(config.data.tokenizer)


def _index(chosen: argparse.Namespace) -> int:
    from dattn_mcore.data.failures import check_share
    from dattn_mcore.data.held_out import held_out_samples
    from dattn_mcore.data.index.store import open_index

    config, tokenizer = _configured(chosen)

    def make(settings: Config, which: str) -> int:
        index = open_index(settings, tokenizer, chosen.workers, chosen.again)
        say(
            f"{len(index):,} {which}samples, {index.num_usable:,} usable, "
            f"{index.content['num_images']:,} images: {index.folder}"
        )
        check_share(index, config.data.max_bad_share)
        if (held_out := held_out_samples(index, settings)) is not None:
            say(
                f"{int(held_out.validated.sum()):,} of them held out, "
                f"{int(held_out.withheld.sum()):,} withheld (validation.share)"
            )
        return 0

    return _indexed(config, make)


def _indexed(config: Config, do: Callable[[Config, str], int]) -> int:
    """Does something with the configuration of each index of a run.

    Args:
        config: Of the run.
        do: Gets a configuration and what its samples are called; returns an exit status.

    Returns:
        The highest status.
    """
    # Imported here: reading a command line should not wait for NumPy.
    from dattn_mcore.data.held_out import named_as_validation, validation_config

    status = do(config, "")
    if config.validation.sources:
        with named_as_validation():
            status = max(status, do(validation_config(config), "held-out "))
    return status


def _check(chosen: argparse.Namespace) -> int:
    from dattn_mcore.data.check import check

    config, tokenizer = _configured(chosen)

    def look(settings: Config, which: str) -> int:
        report = chosen.report
        if which and report is not None:
            report = report.with_name(f"held_out_{report.name}")
        if which:
            say("validation.sources:")
        return check(settings, tokenizer, chosen.workers, chosen.decode, report)

    return _indexed(config, look)


def _stats(chosen: argparse.Namespace) -> int:
    from dattn_mcore.data.pages.stats import write_stats

    config, tokenizer = _configured(chosen)
    for line in write_stats(config, tokenizer, chosen.output, chosen.workers, chosen.dp):
        say(line)
    say(f"wrote {chosen.output.resolve()}")
    return 0


def _preview(chosen: argparse.Namespace) -> int:
    from dattn_mcore.data.pages.preview import write_preview

    config, tokenizer = _configured(chosen)
    write_preview(config, tokenizer, chosen.output, chosen.workers, chosen.samples, chosen.id)
    say(f"wrote {chosen.output.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
