"""The table at the end: accuracy by type of question, and what a blind guess would reach."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from dattn_mcore.console import cell
from dattn_mcore.evaluation.digits_score import score_digits
from dattn_mcore.evaluation.exact_match import ExactMatch, Tally, write_score
from dattn_mcore.quickstart.steps import QuickstartRun


def score(run: QuickstartRun) -> ExactMatch:
    """Compares the answers with the expected ones; writes score.json."""
    result = score_digits(run.questions, run.answers)
    write_score(run.score, result)
    return result


def show(
    run: QuickstartRun,
    result: ExactMatch,
    seconds: dict[str, float],
    total: float,
    console: Console,
    without: tuple[str, str] = ("places", "where"),
) -> None:
    """Prints the table, the time taken and where the results are.

    Args:
        run: where things are.
        result: the score.
        seconds: of each step.
        total: seconds of everything.
        console: to print on.
        without: what a guess does not know, as a noun and as a question word.
    """
    table = Table("question", "right", "of", "accuracy", f"without {without[0]}")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, tally in result.categories.items():
        table.add_row(*_row(name, tally), _guess(result, name))
    table.add_section()
    table.add_row(*_row("all", result.overall), _guess(result, "overall"))
    console.print("\n[bold]Held-out questions, exact match of the generated answer[/bold]")
    console.print(table)
    console.print(
        f"without {without[0]}: the most that is right knowing which digits, not {without[1]}"
    )
    for note in result.notes:  # expected of a blind model, a fault of any other
        console.print(cell(f"note: {note}"), soft_wrap=True)
    console.print()
    steps = ", ".join(f"{name} {taken:.0f} s" for name, taken in seconds.items())
    console.print(f"time      {total:.0f} s ({steps})", soft_wrap=True)
    console.print(cell(f"picture   {run.run_dir / 'report.png'}"), soft_wrap=True)
    console.print(cell(f"model     {run.run_dir / 'hf'} (a Hugging Face folder)"), soft_wrap=True)
    console.print(cell(f"answers   {run.run_dir / 'answers.jsonl'}"), soft_wrap=True)


def _guess(result: ExactMatch, name: str) -> str:
    level = result.guessing(name)
    return "unknown" if level is None else f"{level:.1%}"


def _row(name: str, tally: Tally) -> tuple[str, str, str, str]:
    return name, str(tally.correct), str(tally.total), f"{tally.accuracy:.1%}"
