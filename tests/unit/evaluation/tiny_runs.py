"""Runs of the evaluation with the small random model of `conftest.py`, and what they wrote."""

import json

from dattn_mcore.evaluation.__main__ import main


def run(world, out, *more, data=None):
    return main(
        [
            "run",
            f"--model={world / 'tiny'}",
            f"--data={data or world / 'val'}",
            f"--out={out}",
            "--max-new-tokens=6",
            "--device=cpu",
            *more,
        ]
    )


def answers(out):
    """All answer files of a run, as text, by benchmark."""
    return {path.stem: path.read_text() for path in sorted((out / "answers").glob("*.jsonl"))}


def scores(out):
    return json.loads((out / "scores.json").read_text())
