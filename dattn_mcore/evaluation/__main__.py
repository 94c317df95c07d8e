"""Command line: `python -m dattn_mcore.evaluation {run,check,score,submit,...} ...`."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from dattn_mcore.console import cell, complain, say
from dattn_mcore.errors import DattnError
from dattn_mcore.evaluation import commands
from dattn_mcore.evaluation.benchmarks import BY_NAME
from dattn_mcore.log import log_to_stderr

if TYPE_CHECKING:
    from dattn_mcore.evaluation.exact_match import ExactMatch

PROGRAM = "dattn_mcore.evaluation"
SPEAKER_SECONDS = 20.0  # how long other ranks wait for rank 0 to report a mistake and end


def main(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Runs one command; returns the exit status (1: a benchmark failed, 2: a user's mistake)."""
    options = _parser(prog).parse_args(arguments)
    log_to_stderr()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return options.run(options) or 0
    except DattnError as error:
        if os.environ.get("RANK", "0") == "0":  # all ranks have the same mistake; one says so
            complain(f"error: {error}")
        else:
            # torchrun ends all ranks when the first one ends: let that be the one that speaks. If
            # it has not by then, the mistake is this rank's alone.
            time.sleep(SPEAKER_SECONDS)
            complain(f"error: rank {os.environ['RANK']}: {error}")
        return 2


def _parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description="Answers benchmarks with an exported model, and scores the answers."
    )
    added = parser.add_subparsers(dest="command", required=True)
    many = f"comma-separated, of {', '.join(BY_NAME)}; all if absent"

    run = added.add_parser("run", help="answer and score benchmarks with a model")
    run.add_argument("--model", required=True, help="exported Hugging Face folder")
    run.add_argument("--adapter", help="folder of peft that is added to the model (needs peft)")
    run.add_argument("--data", required=True, help="folder that holds all benchmarks' folders")
    run.add_argument("--benchmarks", help=many)
    run.add_argument("--out", help="folder of this run (runs/evaluation/MODEL); goes on if there")
    run.add_argument(
        "--batch-size", type=_positive, default=16, help="questions at once, each process"
    )
    run.add_argument("--max-new-tokens", type=_positive, help="instead of each benchmark's own")
    run.add_argument(
        "--limit", type=_positive, metavar="N", help="at most N questions of each, always the same"
    )
    run.add_argument("--device", default="auto", help="auto, cpu or gpu")
    run.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    _image_cache(run)
    _scoring(run)
    _judge(run)
    run.set_defaults(run=commands.run)

    check = added.add_parser("check", help="look at a data tree: what is there, what is missing")
    check.add_argument("--data", required=True, help="folder that holds all benchmarks' folders")
    check.add_argument("--benchmarks", help=many)
    _scoring(check)
    check.set_defaults(run=commands.check)

    score = added.add_parser("score", help="score answers that exist already")
    _existing(score)
    _judge(score)
    score.add_argument("--reviews", help="review file of a judge, instead of answers")
    score.add_argument("--json", help="also write the score here")
    score.set_defaults(run=commands.score)

    submit = added.add_parser("submit", help="write the file that a server takes")
    _existing(submit)
    submit.add_argument("--out", required=True, help="folder to write into")
    submit.add_argument("--name", help="name of the file; the answer file's if absent")
    submit.set_defaults(run=commands.submit)

    report = added.add_parser("report", help="HTML report of a run, or of two side by side")
    report.add_argument("runs", nargs="+", help="folder of a run; give two to compare")
    report.add_argument("--out", help="file to write (report.html of the first run)")
    report.set_defaults(run=commands.report)

    _question_files(added.add_parser)
    return parser


def _question_files(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the commands for question files of one's own."""
    answer = add("answer", help="answer a LLaVA question file")
    answer.add_argument("--model", required=True, help="exported Hugging Face folder")
    answer.add_argument("--adapter", help="folder of peft that is added to the model (needs peft)")
    answer.add_argument("--questions", required=True, help="question file, JSON lines")
    answer.add_argument("--image-folder", required=True, help="folder that image paths start in")
    answer.add_argument("--answers", required=True, help="answer file to write, JSON lines")
    answer.add_argument("--batch-size", type=_positive, default=32)
    answer.add_argument("--max-new-tokens", type=_positive, default=128)
    answer.add_argument("--device", default="auto", help="auto, cpu or gpu")
    answer.add_argument("--limit", type=_positive, metavar="N", help="at most N, always the same")
    _image_cache(answer)
    answer.set_defaults(run=_answer)

    exact = add("score-questions", help="exact-match accuracy of a question file")
    _exact_match(exact)
    exact.add_argument("--limit", type=_positive, metavar="N", help="as it was answered with")
    exact.set_defaults(run=_score_questions)

    digits = add("score-digits", help="the same of digits answers, beside guessing")
    _exact_match(digits)
    digits.set_defaults(run=_score_digits)


def _image_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image-cache-gib",
        type=_gib,
        default=4.0,
        metavar="GIB",
        help="memory for images that are asked about again, each process (4); 0: none",
    )


def _exact_match(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--questions", required=True, help="question file with expected answers")
    parser.add_argument("--answers", required=True, help="answer file")
    parser.add_argument("--json", help="also write the score here")


def _existing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--benchmark", required=True, choices=tuple(BY_NAME))
    parser.add_argument("--data", default="data/val", help="folder of all benchmarks' folders")
    parser.add_argument("--answers", help="answer file in LLaVA's form, ours or LLaVA's")
    _scoring(parser)


def _judge(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("judge of LLaVA-Bench and MM-Vet")
    group.add_argument("--judge-url", help="base URL of any OpenAI-compatible endpoint")
    group.add_argument("--judge-model", help="name of its model")
    group.add_argument("--judge-key-env", default="OPENAI_API_KEY", help="variable with its key")
    group.add_argument("--judge-attempts", type=_positive, default=5, help="for one judgement")
    group.add_argument("--judge-wait-seconds", type=_seconds, default=2.0, help="doubles each time")
    group.add_argument("--judge-parallel", type=_positive, default=8, help="requests at once")


def _scoring(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scoring")
    group.add_argument(
        "--as-original",
        action="store_true",
        help="also where the original is wrong: failed judgements averaged in, POPE by position",
    )
    group.add_argument(
        "--lenient-letters", action="store_true", help="SEED-Bench, ScienceQA: 'A.' counts as A"
    )
    group.add_argument(
        "--textvqa-no-ocr", action="store_true", help="TextVQA without OCR tokens in the prompt"
    )
    group.add_argument(
        "--seed-images-only", action="store_true", help="SEED-Bench without its video rows"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of 1 or more")
    return int(text)


def _seconds(text: str) -> float:
    return _not_negative(text, "seconds")


def _gib(text: str) -> float:
    return _not_negative(text, "GiB")


def _not_negative(text: str, unit: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of {unit}, 0 or more")
    return value


def _answer(options: argparse.Namespace) -> None:
    from dattn_mcore.evaluation.questions import part_of, read_questions, write_answers

    questions = part_of(read_questions(options.questions), options.limit)  # before the slow imports

    from dattn_mcore.evaluation.answer import Answerer, Settings
    from dattn_mcore.evaluation.progress import bars

    settings = Settings(
        options.batch_size,
        options.max_new_tokens,
        options.device,
        None if options.adapter is None else Path(options.adapter),
        options.image_cache_gib,
    )
    answerer = Answerer(options.model, settings)
    with bars(Console(stderr=True)) as bar:
        task = bar.add_task("answer", total=len(questions))
        answers = answerer.answer(
            questions,
            options.image_folder,
            lambda done, total: bar.update(task, completed=done),
            checked=lambda line: bar.console.print(cell(line)),
        )
    write_answers(options.answers, answers)
    say(f"{len(answers)} answers -> {options.answers}")


def _score_digits(options: argparse.Namespace) -> int:
    from dattn_mcore.evaluation.digits_score import score_digits

    score = score_digits(options.questions, options.answers)
    return _show_exact_match(score, "digits, exact match", options.json)


def _score_questions(options: argparse.Namespace) -> int:
    from dattn_mcore.evaluation.exact_match import score_file

    score = score_file(options.questions, options.answers, limit=options.limit)
    return _show_exact_match(score, "exact match", options.json)


def _show_exact_match(score: ExactMatch, title: str, json_path: str | None) -> int:
    from dattn_mcore.evaluation.exact_match import Tally, write_score

    columns = ("category", "correct", "total", "accuracy", "guessing")
    table = Table(*columns, title=title)
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, tally: Tally) -> None:
        level = score.guessing(name)
        guessed = "" if level is None else f"{level:.1%}"
        counts = (str(tally.correct), str(tally.total))
        table.add_row(cell(name), *counts, f"{tally.accuracy:.1%}", guessed)

    for name, tally in score.categories.items():
        row(name, tally)
    table.add_section()
    row("overall", score.overall)
    Console().print(table)
    for note in score.notes:
        say(f"note: {note}")
    if json_path:
        write_score(json_path, score)
    return commands.FAILED if score.broken else 0


if __name__ == "__main__":
    sys.exit(main())
