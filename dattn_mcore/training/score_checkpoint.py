"""Scores one checkpoint: exports it, answers evaluation questions, writes scores.json last.

A program of its own, which `dattn_mcore.training.scores` starts:
`python -m dattn_mcore.training.score_checkpoint PARENT FOLDER`. It ends with the process PARENT.
What to do stands in FOLDER/request.json.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dattn_mcore.checkpoint import folders
from dattn_mcore.config.convert import build
from dattn_mcore.config.schema import ScoresConfig
from dattn_mcore.console import complain
from dattn_mcore.errors import DataError, DattnError, error_lines
from dattn_mcore.evaluation.benchmarks import Benchmark, Options, make_benchmark
from dattn_mcore.evaluation.files import read_json_lines, read_object, write_text
from dattn_mcore.log import log_to_stderr
from dattn_mcore.orphans import end_with_parent
from dattn_mcore.training.sinks.sink import Example

if TYPE_CHECKING:
    from dattn_mcore.evaluation.exact_match import ExactMatch
    from dattn_mcore.evaluation.results import Result

REQUEST, SCORES = "request.json", f"{folders.SCORES}.json"
EXPORT = "hf"  # the Hugging Face folder that answers
BENCHMARKS = "benchmarks"  # a run's folder of `dattn_mcore.evaluation run`
QUESTIONS = "questions"  # name of the own question file among the scores
_IMAGE_CACHE_GIB = 1.0  # the run needs its memory: the images of a batch or two are enough
_TOKENS = 128  # of an answer to the own question file, as of `dattn_mcore.evaluation answer`
_MODULE = "dattn_mcore.training.score_checkpoint"


@dataclass(frozen=True)
class Scores:
    """What a checkpoint scored.

    Attributes:
        step: of the checkpoint.
        values: main figure of each benchmark, and of the own questions in percent; None where it
            failed.
        problems: why, of those.
        notes: what must be known to read the others: no better than guessing, answers all the same.
        examples: some answers.
    """

    step: int
    values: dict[str, float | None]
    problems: dict[str, str]
    notes: dict[str, str]
    examples: tuple[Example, ...]


def command(folder: Path) -> list[str]:
    """The command that scores what the request in a folder names, for a child of this process."""
    return [sys.executable, "-m", _MODULE, str(os.getpid()), str(folder)]


def write_request(folder: Path, step: int, checkpoint: Path, settings: ScoresConfig) -> None:
    """Writes what to do into a folder.

    Raises:
        DataError: it cannot be written.
    """
    fields = {
        "step": step,
        "checkpoint": str(checkpoint),
        "settings": dataclasses.asdict(settings),
    }
    write_text(folder / REQUEST, json.dumps(fields, indent=1) + "\n", "request")


def read_scores(folder: Path) -> Scores | None:
    """What a finished process left; None where none has finished, or another program wrote."""
    try:
        found = read_object(folder / SCORES, "scores")
        examples = tuple(
            Example(
                image=None if fields["image"] is None else Path(fields["image"]),
                question=fields["question"],
                answer=fields["answer"],
                reference=fields["reference"],
            )
            for fields in found["examples"]
        )
        return Scores(
            step=found["step"],
            values=dict(found["values"]),
            problems=dict(found["problems"]),
            notes=dict(found.get("notes", {})),
            examples=examples,
        )
    except (DataError, KeyError, TypeError, ValueError):
        return None


def last_line(text: str) -> str:
    """The last error that a program said, else the last line; without the word in front."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1].removeprefix("error: ")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    parent, *rest = list(sys.argv[1:] if arguments is None else arguments)
    end_with_parent(int(parent))
    if rest[0] == "export":
        # The converter imports this package, which imports it for this program only.
        from tools.checkpoint_convert.__main__ import interruptible

        return interruptible(["mcore-to-hf", *rest[1:]])
    log_to_stderr()
    try:
        score(Path(rest[0]))
    except DattnError as error:
        sys.stderr.write(error_lines(error))
        return 2
    return 0


def score(folder: Path) -> None:
    """Does what the request in a folder says.

    Raises:
        DattnError: the model cannot be exported, loaded or asked.
    """
    started = time.monotonic()
    request = read_object(folder / REQUEST, "request")
    settings: ScoresConfig = build(ScoresConfig, request["settings"], "scores.")
    export = folder / EXPORT
    try:
        _export(request["checkpoint"], export)
        values: dict[str, float | None] = {}
        problems: dict[str, str] = {}
        notes: dict[str, str] = {}
        examples: list[Example] = []
        shares = _shares(settings)
        if settings.benchmarks:
            for result in _ask_benchmarks(settings, folder):
                name, scored = result.name, result.score
                values[name] = None if scored is None else scored.value
                if result.error or scored is None:
                    problems[name] = result.error or result.note
                    continue
                if result.note:
                    notes[name] = result.note
                examples += _examples(name, settings, folder, shares[name])
        if settings.questions is not None:
            exact, shown = _ask_questions(settings, folder, shares[QUESTIONS])
            values[QUESTIONS] = 100 * exact.overall.accuracy
            if exact.notes:
                notes[QUESTIONS] = "; ".join(exact.notes)
            examples += shown
    finally:
        if not settings.keep_export:
            shutil.rmtree(export, ignore_errors=True)
    written = {
        "step": request["step"],
        "checkpoint": request["checkpoint"],
        "values": values,
        "problems": problems,
        "notes": notes,
        "examples": [
            {**vars(example), "image": None if example.image is None else str(example.image)}
            for example in examples
        ],
        "seconds": round(time.monotonic() - started, 1),
    }
    write_text(folder / SCORES, json.dumps(written, indent=1, ensure_ascii=False) + "\n", "scores")


class _ExportError(DattnError):
    """A checkpoint that the converter refuses, or an export that fails its self-check."""


def _export(checkpoint: str, export: Path) -> None:
    """Exports with the converter's self-check, in a process that takes its memory with it.

    Raises:
        DattnError: it failed, and has said why on this process's standard error.
    """
    program = [sys.executable, "-m", _MODULE, str(os.getpid()), "export"]
    done = subprocess.run([*program, checkpoint, str(export)], stderr=subprocess.PIPE, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode:
        why = last_line(done.stderr) or f"status {done.returncode}"
        raise _ExportError(f"{checkpoint} was not exported: {why}")


def _ask_benchmarks(settings: ScoresConfig, folder: Path) -> list[Result]:
    # Imported after the export, which may refuse a model: it takes seconds.
    from dattn_mcore.evaluation.run import RunSettings, run

    return run(
        RunSettings(
            model=folder / EXPORT,
            data=Path(settings.data),
            out=folder / BENCHMARKS,
            benchmarks=settings.benchmarks,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            device=settings.device,
            options=Options(limit=settings.samples),
            image_cache_gib=_IMAGE_CACHE_GIB,
        )
    )


def _ask_questions(
    settings: ScoresConfig, folder: Path, shown: int
) -> tuple[ExactMatch, list[Example]]:
    """The score of the answers to the own question file, and some of them."""
    from dattn_mcore.evaluation.answer import Answerer, Settings  # as above
    from dattn_mcore.evaluation.exact_match import score_answers, write_score
    from dattn_mcore.evaluation.questions import part_of, read_questions, write_answers

    assert settings.questions is not None
    questions = part_of(read_questions(settings.questions), settings.samples)
    tokens = settings.max_new_tokens or _TOKENS
    how = Settings(
        batch_size=settings.batch_size,
        max_new_tokens=tokens,
        device=settings.device,
        image_cache_gib=_IMAGE_CACHE_GIB,
    )
    answerer = Answerer(folder / EXPORT, how)
    answers = answerer.answer(questions, settings.image_folder or "", checked=_say)
    texts = {answer.question_id: answer.text for answer in answers}
    result = score_answers(questions, texts)
    write_answers(folder / "answers.jsonl", answers)
    write_score(folder / "questions.json", result)
    root = Path(settings.image_folder or "").resolve()
    chosen = [questions[place] for place in _spread(len(questions), shown)]
    return result, [
        Example(
            image=root / question.images[0] if question.images else None,
            question=question.text,
            answer=texts[question.question_id],
            reference=question.answer or "",
        )
        for question in chosen
    ]


def _say(line: str) -> None:
    complain(line)


def _shares(settings: ScoresConfig) -> dict[str, int]:
    """How many examples are shown of each name."""
    names = [*settings.benchmarks, *([QUESTIONS] if settings.questions is not None else [])]
    whole, left = divmod(settings.examples, len(names))
    return {name: whole + (place < left) for place, name in enumerate(names)}


def _examples(name: str, settings: ScoresConfig, folder: Path, count: int) -> Iterator[Example]:
    """Some answers to a benchmark, from what the evaluation wrote about each row."""
    benchmark = make_benchmark(name, settings.data, Options(limit=settings.samples))
    path = folder / BENCHMARKS / "details" / f"{name}.jsonl"
    details = [record for _, record in read_json_lines(path, "details")]
    for place in _spread(len(benchmark.rows), count):
        yield Example(
            image=_image_file(benchmark, place, folder),
            question=benchmark.rows[place].prompt,
            answer=details[place].get("answer") or "",
            reference=details[place].get("truth", ""),
        )


def _image_file(benchmark: Benchmark, place: int, folder: Path) -> Path | None:
    """The first image of a row as a file; one that lies in a table is written to one."""
    picture = next(iter(benchmark.rows[place].pictures), None)
    if picture is None:
        return None
    source = picture.source
    if isinstance(source, Path):
        return source.resolve()
    path = folder / "examples" / f"{benchmark.name}_{place}.png"
    path.parent.mkdir(exist_ok=True)
    picture.open(benchmark.title).save(path)
    return path.resolve()


def _spread(total: int, count: int) -> list[int]:
    """So many places of a list at most, evenly spread."""
    count = min(total, count)
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


if __name__ == "__main__":
    sys.exit(main())
