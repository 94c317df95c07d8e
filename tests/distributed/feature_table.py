"""The tables of docs/testing.md, from what the tests run: `python -m tests.distributed.feature_table`.

A feature that a layout does not meet is shown with its reason; `test_feature_table` fails where
neither a test nor a reason stands.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dattn_mcore.config.schema import AttentionConfig, ParallelConfig, TrainConfig
from tests.distributed.features import (
    CASES,
    EXCLUDED,
    FACTORS,
    LAYOUT,
    MEANING,
    MEANS,
    USUAL,
    case_id,
    numbers,
)
from tests.pairwise import Pair

PAGE = Path(__file__).resolve().parents[2] / "docs/testing.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
# Settings of the sections that make layouts and features, which no case sets, and why.
ELSEWHERE = {
    "parallel.tp_comm_overlap": "needs Transformer Engine and a GPU",
    "parallel.timeout_minutes": "no result depends on it; `test_health` lets ranks hang",
    "train.stage": "names a run",
    "train.global_batch_size": "the batch is the same in all layouts; `test_data_steps`",
    "train.steps": "three in every case",
    "train.epochs": "`test_corrupt_corpus` and `test_killed` run over epochs in three layouts",
    "train.precision": "bf16 in some of the cases: `test_bf16_follows_fp32`",
    "train.fp8": "needs Transformer Engine: `tests/te`, and `tests/gpu` on a GPU",
    "train.fp8_bf16_layers": "needs Transformer Engine: `tests/te`, and `tests/gpu` on a GPU",
    "train.transformer_impl": "Transformer Engine: `tests/te`, and `tests/gpu` on a GPU",
    "train.ema_decay": "changes no weight; `test_ema` runs it in each layout",
    "train.ema_start": "likewise",
    "train.seed": "one for all cases",
    "train.deterministic": "changes kernels of a GPU; `test_command_line` runs it on a CPU",
    "train.device": "`tests/gpu` runs on a GPU what it can hold",
    "attention.backend": "`reference` is what all cases are compared with; others need a GPU",
}
SECTIONS = {"parallel": ParallelConfig, "train": TrainConfig, "attention": AttentionConfig}


def settings_without_a_case() -> set[str]:
    """Settings of `SECTIONS` that no value of a factor sets."""
    every = {
        f"{section}.{field.name}"
        for section, kind in SECTIONS.items()
        for field in dataclasses.fields(kind)
    }
    named = {
        f"{section}.{name}"
        for values in FACTORS.values()
        for settings in values.values()
        for section, own in settings.items()
        for name in own
    }
    return every - named


def cell(feature: tuple[str, str], layout: tuple[str, str]) -> str:
    """Numbers of the cases that hold both, or why there can be none."""
    pair: Pair = frozenset({feature, layout})
    return ", ".join(map(str, numbers(feature, layout))) or f"({EXCLUDED.get(pair, '')})"


def layouts() -> list[tuple[str, str]]:
    """Columns of the first table."""
    return [(name, value) for name, values in LAYOUT.items() for value in values]


def features() -> list[tuple[str, str]]:
    """Its rows."""
    return [(name, value) for name, values in {**MEANING, **MEANS}.items() for value in values]


def tables() -> str:
    """What stands between the marks of the page."""
    columns = layouts()
    lines = [
        f"| feature | {' | '.join(value for _, value in columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for name, value in features():
        cells = " | ".join(cell((name, value), column) for column in columns)
        usual = " (usual)" if value == USUAL[name] else ""
        lines.append(f"| {name}: {value}{usual} | {cells} |")
    lines += ["", "The cases, with what is not as usual:", ""]
    lines += [f"- {case_id(case)}" for case in CASES]
    lines += ["", "Pairs that no run can hold:", ""]
    for pair, reason in EXCLUDED.items():
        one, other = sorted(pair)
        lines.append(f"- {one[1]} with {other[1]}: {reason}.")
    lines += ["", "Settings of `parallel`, `train` and `attention` that no case changes:", ""]
    lines += [f"- `{name}`: {reason}." for name, reason in sorted(ELSEWHERE.items())]
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with new tables."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
