"""The score file of a run's folder: a call that runs some benchmarks keeps the others' scores."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.files import read_object, take, write_text
from dattn_mcore.evaluation.guessing import Guess
from dattn_mcore.evaluation.results import Result
from dattn_mcore.evaluation.scores import Bar, Score

logger = logging.getLogger(__name__)


def earlier_results(
    path: Path, run: dict[str, Any], identity: Sequence[str], names: Sequence[str]
) -> list[Result]:
    """Results of earlier calls into the same folder, of benchmarks that this call did not run.

    Args:
        path: the score file.
        run: what this call's scores depend on.
        identity: keys of `run` that must be as they were: the scores are of another model else.
        names: benchmarks of this call.
    """
    if not path.is_file():
        return []
    try:
        found = read_object(path, "scores")
        then = take(found, "run", dict, str(path))
        if any(then.get(key) != run[key] for key in identity):
            return []
        # Such as the date, the options and the data: of each score, those it was made with.
        changed = {k: v for k, v in then.items() if v != run.get(k) and k != "seconds"}
        entries = take(found, "benchmarks", dict, str(path))
        results = [_result(name, entry) for name, entry in entries.items() if name not in names]
    except (DataError, LookupError, TypeError, ValueError, AttributeError) as error:
        logger.warning("%s is damaged (%s); its earlier scores are left out", path, error)
        return []
    for result in results:
        result.more["earlier"] = {**changed, **result.more.get("earlier", {})}
    return results


def write_scores(path: Path, run: dict[str, Any], results: Sequence[Result]) -> None:
    """One JSON of all scores, with what they depend on."""
    value = {"run": run, "benchmarks": {result.name: result.to_json() for result in results}}
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", "scores")


def _result(name: str, entry: dict[str, Any]) -> Result:
    """A result from its JSON; the outcomes are not there."""
    more = dict(entry)
    result = Result(name, more.pop("title"), more.pop("rows"), note=more.pop("note", ""))
    result.error = more.pop("error", None)
    del more["status"]
    if "submission" in more:
        result.submission = Path(more.pop("submission"))
    if "metric" in more:
        bars = {k: Bar(b["value"], b["rows"]) for k, b in more.pop("categories").items()}
        figures = {k: more.pop(k) for k in ("metric", "value", "unit", "figures", "notes")}
        names = ("figure", "right", "total", "expected", "needed")
        guesses = [Guess(*(g[name] for name in names)) for g in more.pop("compared", [])]
        result.score = Score(
            **figures,
            categories=bars,
            guessing=more.pop("guessing", None),
            guesses=guesses,
            broken=more.pop("broken", ""),
        )
    result.more = more
    return result
