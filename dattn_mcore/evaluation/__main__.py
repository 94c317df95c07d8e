"""Command line: `python -m dattn_mcore.evaluation {answer,score-digits} ...`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from dattn_mcore.errors import DattnError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status (2 for a user's mistake)."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        options.run(options)
    except DattnError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dattn_mcore.evaluation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    answer = commands.add_parser("answer", help="answer a LLaVA question file")
    answer.add_argument("--model", required=True, help="exported Hugging Face folder")
    answer.add_argument("--questions", required=True, help="question file, JSON lines")
    answer.add_argument("--image-folder", required=True, help="folder that image paths start in")
    answer.add_argument("--answers", required=True, help="answer file to write, JSON lines")
    answer.add_argument("--batch-size", type=_positive, default=32)
    answer.add_argument("--max-new-tokens", type=_positive, default=128)
    answer.add_argument("--device", default="auto", help="auto, cpu or gpu")
    answer.set_defaults(run=_answer)

    score = commands.add_parser("score-digits", help="exact-match accuracy of digits answers")
    score.add_argument("--questions", required=True, help="question file with expected answers")
    score.add_argument("--answers", required=True, help="answer file")
    score.add_argument("--json", help="also write the score here")
    score.set_defaults(run=_score)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of 1 or more")
    return int(text)


class _Rate(ProgressColumn):
    """Questions per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} questions/s")


def _answer(options: argparse.Namespace) -> None:
    from dattn_mcore.evaluation.questions import read_questions, write_answers

    questions = read_questions(options.questions)  # before the slow imports: mistakes show at once

    from transformers.utils import logging as transformers_logging

    from dattn_mcore.evaluation.answer import Answerer, Settings

    transformers_logging.disable_progress_bar()
    settings = Settings(options.batch_size, options.max_new_tokens, options.device)
    answerer = Answerer(options.model, settings)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("answer", total=len(questions))
        answers = answerer.answer(
            questions,
            options.image_folder,
            lambda done, total: bar.update(task, completed=done),
        )
    write_answers(options.answers, answers)
    sys.stdout.write(f"{len(answers)} answers -> {options.answers}\n")


def _score(options: argparse.Namespace) -> None:
    from dattn_mcore.evaluation.score import Tally, score_digits, write_score

    score = score_digits(options.questions, options.answers)
    table = Table("category", "correct", "total", "accuracy", title="digits, exact match")
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, tally: Tally) -> None:
        table.add_row(name, str(tally.correct), str(tally.total), f"{tally.accuracy:.1%}")

    for name, tally in score.categories.items():
        row(name, tally)
    table.add_section()
    row("overall", score.overall)
    Console().print(table)
    if options.json:
        write_score(options.json, score)


if __name__ == "__main__":
    sys.exit(main())
