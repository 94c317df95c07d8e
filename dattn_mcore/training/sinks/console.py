"""One line an interval, for people."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from dattn_mcore.training.sinks.sink import Example, Kind, Row, Value
from dattn_mcore.units import duration, rate

logger = logging.getLogger(__name__)
WORTH_SAYING = 0.1  # share of the time spent waiting for data from which the line says so


class ConsoleSink:
    """Logs a line for every row."""

    def write(self, row: Row) -> None:
        """Logs the row."""
        at = f"step {row.step:>{len(str(row.last_step))}}/{row.last_step}"
        line = {"train": _train, "validation": _validation, "scores": _scores}[row.kind]
        logger.info("%s  %s", at, line(row.values))

    def show(self, kind: Kind, step: int, examples: Sequence[Example]) -> None:
        """Logs the first examples."""
        for example in examples[:3]:
            logger.info(
                "  %s -> %s%s",
                example.question.replace("\n", " "),
                example.answer or "(nothing)",
                f" ({example.reference})" if example.reference else "",
            )

    def close(self) -> None:
        """Nothing is open."""


def _number(value: Value, form: str) -> str:
    return "none" if value is None else format(value, form)


def _rate(value: Value) -> str:
    return rate(value or 0.0)


def _train(values: dict[str, Value]) -> str:
    parts = [
        f"loss {_number(values['loss'], '.4f')}",
        f"lr {values['lr']:.2e}",
        f"grad {_number(values['grad_norm'], '.2f')}",
        f"{_rate(values['samples_per_second'])} samples/s",
        f"{_rate(values['text_tokens_per_second'])} text + "
        f"{_rate(values['visual_tokens_per_second'])} visual tokens/s",
        f"ETA {duration(values['eta_seconds'] or 0)}",
    ]
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    if "peak_memory_gib" in values:
        parts.append(f"{values['peak_memory_gib']:.1f} GiB")
    if (values["data_wait_share"] or 0.0) > WORTH_SAYING:
        parts.append(f"waits for data {values['data_wait_share']:.0%}")
    return "  ".join(parts)


def _validation(values: dict[str, Value]) -> str:
    parts = [f"held-out loss {_number(values['loss'], '.4f')}"]
    for name in ("images", "text_only"):
        if f"loss/{name}" in values:
            parts.append(f"{name.replace('_', '-')} {_number(values[f'loss/{name}'], '.4f')}")
    parts.append(f"best {_number(values['best_loss'], '.4f')} at step {values['best_step']}")
    parts.append(f"{values['samples']} samples in {duration(values['seconds'] or 0)}")
    return "  ".join(parts)


def _scores(values: dict[str, Value]) -> str:
    return "  ".join(f"{name} {_number(value, '.4g')}" for name, value in values.items())
