"""What the commands do, each given its parsed options."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dattn_mcore.console import cell, say
from dattn_mcore.errors import ConfigError, DataError
from dattn_mcore.evaluation.benchmarks import BY_NAME, Benchmark, Options, make_benchmark
from dattn_mcore.evaluation.benchmarks.judged import Judged
from dattn_mcore.evaluation.files import read_json_lines, write_text
from dattn_mcore.evaluation.report import write_report
from dattn_mcore.evaluation.results import JudgeAnswers, Result, table

FAILED = 1  # something was wrong with a benchmark or its answers, not with the command


def run(options: argparse.Namespace) -> int:
    """Answers and scores benchmarks with a model."""
    names = _names(options.benchmarks)
    for name in names:
        make_benchmark(name, options.data)  # before the slow imports: mistakes show at once
    judge = judge_from(options)
    from dattn_mcore.evaluation.generation import check_model_folder

    model = Path(options.model)
    check_model_folder(model)
    adapter = None if options.adapter is None else Path(options.adapter)
    name = model.resolve().name
    if adapter is not None:
        from dattn_mcore.evaluation.adapter import check_adapter_folder

        check_adapter_folder(adapter)
        name += f"+{adapter.resolve().name}"
    from dattn_mcore.evaluation.run import RunSettings
    from dattn_mcore.evaluation.run import run as run_benchmarks

    out = Path(options.out or f"runs/evaluation/{name}")
    settings = RunSettings(
        model=model,
        data=Path(options.data),
        out=out,
        benchmarks=names,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        device=options.device,
        dtype=options.dtype,
        options=replace(scoring_options(options), limit=options.limit),
        adapter=adapter,
        image_cache_gib=options.image_cache_gib,
    )
    results = run_benchmarks(settings, judge)
    if not results:  # not rank 0
        return 0
    _console().print(table(results, f"{name}, {options.data}"))
    say(f"scores {out / 'scores.json'}")
    say(f"report {write_report([out])}")
    return FAILED if any(result.fault for result in results if result.name in names) else 0


def check(options: argparse.Namespace) -> int:
    """Looks at a data tree."""
    from dattn_mcore.evaluation import check as checks

    chosen = scoring_options(options)
    if not Path(options.data).is_dir():
        raise DataError(f"--data {options.data} is no folder; give the one that holds all data")
    findings = [
        checks.check(make_benchmark(name, options.data, chosen))
        for name in _names(options.benchmarks)
    ]
    _console().print(checks.table(findings))
    return FAILED if any(finding.problems for finding in findings) else 0


def score(options: argparse.Namespace) -> int:
    """Scores answers, or the reviews of a judge, that exist already."""
    benchmark = _one(options)
    judge = judge_from(options)
    result = Result(benchmark.name, benchmark.title)
    answers: list[str | None] | None = None
    if options.reviews and options.answers:
        raise ConfigError(
            "--reviews are scored as they are, --answers are judged anew; give one of them"
        )
    if options.reviews:
        if not isinstance(benchmark, Judged):
            raise ConfigError(f"--reviews: {benchmark.title} is not judged; give --answers")
        reviews = [record for _, record in read_json_lines(Path(options.reviews), "--reviews")]
        result.rows, result.score = len(reviews), benchmark.score_reviews(reviews)
    elif isinstance(benchmark, Judged):
        if judge is None:
            raise ConfigError(
                f"{benchmark.title} is judged; give --judge-url and --judge-model, or --reviews"
            )
        answers = _answers(options, benchmark)
        path = Path(options.answers).with_suffix(".reviews.jsonl")
        result.rows, result.score = len(answers), judge(benchmark, answers, path)
    else:
        answers = _answers(options, benchmark)
        result.rows, result.score = len(answers), benchmark.score(answers)
    coverage = [] if answers is None else benchmark.coverage()
    result.score = result.score.looked_at(answers, coverage)
    result.note = "; ".join(result.score.notes)
    console = _console()
    console.print(table([result], options.answers or options.reviews))
    console.print(_figures(result))
    if options.json:
        text = json.dumps({benchmark.name: result.to_json()}, indent=2, ensure_ascii=False)
        write_text(Path(options.json), text + "\n", "--json")
    return FAILED if result.fault else 0


def submit(options: argparse.Namespace) -> int:
    """Writes the file that a server or an official tool takes."""
    benchmark = _one(options)
    answers = _answers(options, benchmark)
    name = options.name or Path(options.answers).stem
    path = benchmark.submit(answers, Path(options.out), name)
    missing = sum(answer is None for answer in answers)
    left = f" ({missing} of {len(answers)} without an answer)" if missing else ""
    say(f"{benchmark.title} submission {path}{left}")
    return 0


def report(options: argparse.Namespace) -> int:
    """Writes the report of one run, or of two side by side."""
    runs = [Path(run) for run in options.runs]
    if len(runs) > 2:
        raise ConfigError(f"report takes one run or two, {len(runs)} are given")
    say(f"report {write_report(runs, options.out and Path(options.out))}")
    return 0


def scoring_options(options: argparse.Namespace) -> Options:
    """The choices about scoring on the command line."""
    return Options(
        as_original=options.as_original,
        lenient_letters=options.lenient_letters,
        textvqa_ocr=not options.textvqa_no_ocr,
        seed_images_only=options.seed_images_only,
    )


def judge_from(options: argparse.Namespace) -> JudgeAnswers | None:
    """The judge that the command line names, if it does.

    Raises:
        ConfigError: half of it is missing.
    """
    if bool(options.judge_url) != bool(options.judge_model):
        raise ConfigError("--judge-url and --judge-model go together; give both or none")
    if not options.judge_url:
        return None
    from dattn_mcore.evaluation.judge import Judge, JudgeSettings

    key = os.environ.get(options.judge_key_env, "").strip()  # files with keys end in a line break
    attempts, parallel = options.judge_attempts, options.judge_parallel
    return Judge(
        JudgeSettings(
            options.judge_url,
            options.judge_model,
            key,
            attempts=attempts,
            parallel=parallel,
            wait_seconds=options.judge_wait_seconds,
        )
    )


def _names(text: str | None) -> tuple[str, ...]:
    names = list(BY_NAME) if text is None else [name.strip() for name in text.split(",")]
    chosen = tuple(dict.fromkeys(name for name in names if name))
    if not chosen:
        raise ConfigError(f"--benchmarks is {text!r}; name at least one of {', '.join(BY_NAME)}")
    return chosen


def _one(options: argparse.Namespace) -> Benchmark:
    return make_benchmark(options.benchmark, options.data, scoring_options(options))


def _answers(options: argparse.Namespace, benchmark: Benchmark) -> list[str | None]:
    from dattn_mcore.evaluation.answer_files import read_answers_for

    if not options.answers:
        raise ConfigError("--answers is missing; give an answer file in LLaVA's form")
    return read_answers_for(benchmark, Path(options.answers))


def _figures(result: Result) -> Table:
    """Every figure and category of one score."""
    shown = Table("figure", "value", "rows")
    for column in shown.columns[1:]:
        column.justify = "right"
    assert result.score is not None
    for name, value in result.score.figures.items():
        shown.add_row(cell(name), f"{value:.2f}".removesuffix(".00"), "")
    shown.add_section()
    for name, bar in result.score.categories.items():
        shown.add_row(cell(name), f"{bar.value:.2f}", str(bar.count))
    return shown


def _console() -> Console:
    """Tables keep their notes whole in files and logs."""
    console = Console()
    return console if console.is_terminal else Console(width=200)
