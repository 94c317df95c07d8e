"""The HTML report of one run, or of two side by side: scores, categories, samples."""

from __future__ import annotations

import base64
import io
import random
from pathlib import Path
from typing import Any

from dattn_mcore.errors import DataError, DattnError
from dattn_mcore.evaluation.benchmarks import BY_NAME, Options, make_benchmark
from dattn_mcore.evaluation.files import read_json, read_json_lines, take, write_text
from dattn_mcore.evaluation.images import Picture
from dattn_mcore.evaluation.report_html import page
from dattn_mcore.evaluation.report_sections import Sample, Section
from dattn_mcore.evaluation.run_folder import RunFolder

SAMPLES = 6  # of each kind
THUMBNAIL_PIXELS = 320
SEED = 0  # the same samples every time


def write_report(runs: list[Path], out: Path | None = None) -> Path:
    """Writes the report of one run, or of two side by side.

    Args:
        runs: folders of one or two runs.
        out: file to write; None: `report.html` in the first run's folder.

    Raises:
        DataError: a folder holds no finished run, or the file cannot be written.
    """
    loaded = [_load(RunFolder(path)) for path in runs]
    names = [name for name in BY_NAME if any(name in run["benchmarks"] for run in loaded)]
    sections = [_section(name, runs, loaded) for name in names]
    target = out or RunFolder(runs[0]).report
    return write_text(target, page(_labels(runs, loaded), loaded, sections), "report")


def _load(folder: RunFolder) -> dict[str, Any]:
    if not folder.scores.is_file():
        raise DataError(f"{folder.path} holds no scores.json; give the folder of a finished run")
    found = read_json(folder.scores, "scores")
    where = f"{folder.scores}, which should be the score file of a run,"
    take(found, "run", dict, where)
    for name in take(found, "benchmarks", dict, where):
        take(take(found["benchmarks"], name, dict, where), "status", str, f"{where} at {name}")
    return found


def _labels(runs: list[Path], loaded: list[dict[str, Any]]) -> list[str]:
    """Names of the models, with the runs' folders where the models are called the same."""
    models = [run["run"]["model_id"] for run in loaded]
    if len(set(models)) == len(models):
        return models
    return [f"{model} ({path.name})" for model, path in zip(models, runs, strict=True)]


def _section(name: str, runs: list[Path], loaded: list[dict[str, Any]]) -> Section:
    missing = {"title": BY_NAME[name].title, "status": "not run"}
    entries = [run["benchmarks"].get(name, missing) for run in loaded]
    section = Section(name, BY_NAME[name].title, entries)
    details = [_details(RunFolder(path), name) for path in runs]
    if not details[0]:
        return section
    if any(rows and len(rows) != len(details[0]) for rows in details[1:]):
        section.entries[1] = {**entries[1], "note": "asked about other rows"}
        details = details[:1]
    pictures = _pictures(name, {**loaded[0]["run"], **entries[0].get("earlier", {})})
    for heading, numbers in choose(details).items():
        section.samples[heading] = [_sample(i, details, pictures) for i in numbers]
    return section


def _details(folder: RunFolder, name: str) -> list[dict[str, Any]]:
    path = folder.details / f"{name}.jsonl"
    return [record for _, record in read_json_lines(path, "details")] if path.is_file() else []


def choose(details: list[list[dict[str, Any]]]) -> dict[str, list[int]]:
    """Which rows to show: the worst, some at random, and where two runs differ most.

    Args:
        details: rows of each run.
    """
    dice = random.Random(SEED)
    order = list(range(len(details[0])))
    dice.shuffle(order)  # among equals, any
    chosen: dict[str, list[int]] = {}

    def credit(run: int, row: int) -> float | None:
        return details[run][row].get("credit") if details[run] else None

    def differ(row: int) -> float:
        first, second = credit(0, row), credit(1, row)
        return 0.0 if first is None or second is None else abs(first - second)

    if len(details) == 2:
        apart = sorted((i for i in order if differ(i) > 0), key=differ, reverse=True)
        chosen["Where the runs differ most"] = apart[:SAMPLES]
    scored = [(value, i) for i in order if (value := credit(0, i)) is not None]
    worst = sorted((pair for pair in scored if pair[0] < 1), key=lambda pair: pair[0])
    chosen["Worst"] = [i for _, i in worst[:SAMPLES]]
    chosen["Random"] = dice.sample(range(len(order)), min(SAMPLES, len(order)))
    return {heading: numbers for heading, numbers in chosen.items() if numbers}


def _pictures(name: str, run: dict[str, Any]) -> list[tuple[Picture, ...]]:
    """Images of all rows; none where the data are gone, which the report then says."""
    try:
        benchmark = make_benchmark(name, run["data"], Options(**run["options"]))
        return [row.pictures for row in benchmark.rows]
    except DattnError:
        return []


def _sample(
    number: int, details: list[list[dict[str, Any]]], pictures: list[tuple[Picture, ...]]
) -> Sample:
    rows = [run[number] if run else {} for run in details]
    shown = pictures[number] if number < len(pictures) else ()
    return Sample(
        question=rows[0]["question"],
        images=[image for picture in shown if (image := thumbnail(picture))],
        truth=rows[0].get("truth", ""),
        answers=[row.get("answer") or "" for row in rows],
        credits=[row.get("credit") for row in rows],
        number=number,
    )


def thumbnail(picture: Picture) -> str:
    """A small JPEG in base64; empty where the image cannot be opened any more."""
    try:
        image = picture.open("report")
    except DattnError:
        return ""
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()
