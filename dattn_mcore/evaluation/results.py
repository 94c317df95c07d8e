"""From answers to results: score, submission, details of every row, one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from dattn_mcore.console import cell
from dattn_mcore.evaluation.benchmarks.base import Benchmark
from dattn_mcore.evaluation.benchmarks.judged import Judged
from dattn_mcore.evaluation.failures import reason
from dattn_mcore.evaluation.files import write_json_lines
from dattn_mcore.evaluation.guessing import look_at
from dattn_mcore.evaluation.outcome import Outcome
from dattn_mcore.evaluation.run_folder import RunFolder
from dattn_mcore.evaluation.scores import Score

# Scores a judged benchmark's answers, given the file that keeps the judgements.
JudgeAnswers = Callable[[Judged, Sequence[str | None], Path], Score]


@dataclass
class Result:
    """What became of one benchmark.

    Attributes:
        name: on the command line.
        title: as people write it.
        rows: questions.
        score: None where it was not scored here.
        submission: file for a server, if it has one.
        error: why it failed.
        note: what is left to do.
        broken: why the answers of an unscored benchmark cannot be a working model's.
        more: further fields for the JSON: prompt, decoding, answer file.
    """

    name: str
    title: str
    rows: int = 0
    score: Score | None = None
    submission: Path | None = None
    error: str | None = None
    note: str = ""
    broken: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """failed, scored, submission or answered."""
        if self.error:
            return "failed"
        return "scored" if self.score else "submission" if self.submission else "answered"

    @property
    def fault(self) -> str:
        """Why this benchmark must not pass for a success; empty: it may."""
        return self.error or (self.score.broken if self.score else self.broken)

    def to_json(self) -> dict[str, Any]:
        """All but the outcomes."""
        return {
            "title": self.title,
            "status": self.status,
            "rows": self.rows,
            **({} if self.error is None else {"error": self.error}),
            **({} if self.score is None else self.score.summary()),
            **({} if self.submission is None else {"submission": str(self.submission)}),
            **({"note": self.note} if self.note else {}),
            **({"broken": self.broken} if self.broken else {}),
            **self.more,
        }


def evaluate(
    benchmark: Benchmark,
    answers: Sequence[str | None],
    folder: RunFolder,
    model_id: str,
    judge: JudgeAnswers | None,
) -> Result:
    """Scores answers, writes the submission and the details; a failure is part of the result.

    A score stands also where its submission cannot be written; the note says why.

    Args:
        benchmark: whose rows were answered.
        answers: text for each row, None where there is none.
        folder: where the files go.
        model_id: names the submission.
        judge: asks the judge; None: there is none.
    """
    result = Result(benchmark.name, benchmark.title, len(benchmark.rows))
    unsubmitted = ""
    whole = len(benchmark.rows) == len(benchmark.all_rows)
    if benchmark.submits and not whole:
        result.note = "no submission: a part of the rows is asked"
    elif benchmark.submits:
        try:
            target = folder.submissions / benchmark.name
            result.submission = benchmark.submit(answers, target, model_id)
            result.note = "submission written"
        except Exception as error:  # its score is worth having all the same
            unsubmitted = reason(error, folder, benchmark.name)
    try:
        if isinstance(benchmark, Judged):
            if judge is None:
                result.note = "not judged; give --judge-url and --judge-model"
            else:
                reviews = folder.reviews / f"{benchmark.name}.jsonl"
                result.score = judge(benchmark, answers, reviews)
        elif benchmark.scores and not benchmark.unscored():
            result.score = benchmark.score(answers)
        elif benchmark.scores:
            result.note = benchmark.unscored()
        outcomes = result.score.outcomes if result.score else []
        write_details(folder.details / f"{benchmark.name}.jsonl", benchmark, answers, outcomes)
    except Exception as error:  # a defect too: the other benchmarks go on
        result.error = reason(error, folder, benchmark.name)
    if result.score:
        result.score = result.score.looked_at(answers, benchmark.coverage())
        result.note = "; ".join(result.score.notes)
        if unsubmitted:
            result.note = "; ".join([f"no submission: {unsubmitted}", *result.score.notes])
    elif unsubmitted and not result.error:
        result.error = unsubmitted
    elif not result.error:
        odd, result.broken = look_at(answers, [])
        result.note = "; ".join([*odd, result.note] if result.note else odd)
    return result


def write_details(
    path: Path,
    benchmark: Benchmark,
    answers: Sequence[str | None],
    outcomes: Sequence[Outcome],
) -> None:
    """One line for each row: question, images, answer, and where scored what became of it."""
    records = []
    for number, (row, answer) in enumerate(zip(benchmark.rows, answers, strict=True)):
        record: dict[str, Any] = {
            "row": number,
            "question_id": row.question_id,
            "question": row.prompt,
            "images": [picture.name for picture in row.pictures],
            "category": row.category,
            "answer": answer,
        }
        if number < len(outcomes):
            outcome = outcomes[number]
            record |= {
                "parsed": outcome.parsed,
                "truth": outcome.truth,
                "credit": outcome.credit,
            }
        records.append(record)
    write_json_lines(path, records, "details")


def table(results: Sequence[Result], title: str) -> Table:
    """One row for each benchmark: metric, score, rows, and what to know or what failed."""
    shown = Table("benchmark", "metric", "score", "guessing", "rows", "notes", title=cell(title))
    for column in (2, 3, 4):
        shown.columns[column].justify = "right"
    for result in results:
        score = result.score
        metric = score.metric if score else result.status
        figure = level = ""
        if score:
            unit = "%" if score.unit == "%" else ""
            figure = f"{score.value:.2f}{unit}"
            level = "" if score.guessing is None else f"{score.guessing:.2f}{unit}"
        note = f"failed: {result.error}" if result.error else result.note
        shown.add_row(result.title, metric, figure, level, str(result.rows or ""), cell(note))
    return shown
