"""Checks a data tree: what is missing, how many rows and images, what is not as expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.table import Table

from dattn_mcore.console import cell
from dattn_mcore.errors import DattnError
from dattn_mcore.evaluation.benchmarks.base import Benchmark, repeated


@dataclass
class Finding:
    """What is there of one benchmark.

    Attributes:
        title: as people write it.
        rows: questions.
        released_rows: questions of the released file; 0: unknown.
        images: different images that they name.
        problems: what keeps it from being run, scored or submitted.
        notes: what is unusual and harmless.
    """

    title: str
    rows: int = 0
    released_rows: int = 0
    images: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        """complete, partial or larger than the released file, or usable where its size is unknown.

        Where there are problems, their number.
        """
        count = len(self.problems)
        if count:
            return f"{count} problem{'s' if count > 1 else ''}"
        if not self.released_rows:
            return "usable"
        if self.rows == self.released_rows:
            return "complete"
        return "partial" if self.rows < self.released_rows else "larger"


def check(benchmark: Benchmark) -> Finding:
    """Looks at all files of a benchmark; of images at their first bytes."""
    finding = Finding(benchmark.title, released_rows=benchmark.full_rows)
    if not benchmark.root.is_dir():
        finding.problems.append(f"{benchmark.root} is no folder")
        return finding
    for name in benchmark.required():
        if not (benchmark.root / name).exists():
            finding.problems.append(f"{name} is missing")
    try:
        rows = benchmark.rows
    except DattnError as error:
        if not finding.problems:
            finding.problems.append(str(error))
        return finding
    pictures = {p.name: p for row in rows for p in row.pictures}
    missing = [name for name, picture in pictures.items() if not picture.exists()]
    finding.rows, finding.images = len(rows), len(pictures) - len(missing)
    finding.released_rows = benchmark.released_rows
    if missing:
        hint = benchmark.images_hint(missing)
        finding.problems.append(f"{len(missing)} images are missing (first: {missing[0]}){hint}")
    faults = [(name, picture.fault()) for name, picture in pictures.items()]
    faults = [(name, fault) for name, fault in faults if fault]
    if faults:
        name, fault = faults[0]
        finding.problems.append(f"{len(faults)} files are no images (first: {name} {fault})")
    finding.problems += repeated(benchmark)
    if finding.released_rows not in (0, len(rows)):
        finding.notes.append(f"the released file has {finding.released_rows:,} rows")
    without = sum(not row.pictures for row in rows)
    if without:
        finding.notes.append(f"{without} rows have no image")
    try:
        finding.notes += benchmark.check_truth()
    except DattnError as error:
        if not finding.problems:
            finding.problems.append(str(error))
    return finding


def table(findings: Sequence[Finding]) -> Table:
    """One row for each benchmark."""
    shown = Table("benchmark", "rows", "images", "state", "notes")
    for column in (1, 2):
        shown.columns[column].justify = "right"
    for finding in findings:
        counts = (f"{finding.rows:,}", f"{finding.images:,}") if finding.rows else ("", "")
        notes = "; ".join([*finding.problems, *finding.notes])
        shown.add_row(finding.title, *counts, finding.state, cell(notes))
    return shown
