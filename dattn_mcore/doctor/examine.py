"""The examination: everything is looked at side by side, then put together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from dattn_mcore.config.load import to_dict
from dattn_mcore.config.schema import Config
from dattn_mcore.doctor.children import Child, Told
from dattn_mcore.doctor.machine import build_rows, machine_rows, triton_lacks
from dattn_mcore.doctor.packages import OPTIONAL, Packages
from dattn_mcore.doctor.report import Problem, Report, Row
from dattn_mcore.parallel.gpu_machine import driver_gpus, hidden_gpus, why_unused

_CHOICES = "dattn_mcore.doctor.choices"
# Steps of `choices` whose rows stand in other tables.
_ELSEWHERE = ("PyTorch", "GPUs")


def examine(config: Config, subject: str) -> Report:
    """Looks at this machine.

    Args:
        config: a checked configuration.
        subject: what the report calls it.
    """
    choices = Child(_CHOICES, given=json.dumps(to_dict(config)))
    packages = Packages(config)
    gpus, why_none = driver_gpus()
    machine = machine_rows(config)
    build, build_missing = build_rows(has_gpus=bool(gpus))
    told = choices.told()
    steps = told.steps

    report = Report(subject)
    report.sections["what a run takes"] = list(_taken(told))
    rows, unusable, absent = packages.rows(_error_of(told, "megatron-core"))
    of_torch = _rows(steps, "PyTorch")
    report.sections["packages"] = rows
    gpu_rows = [
        Row(f"GPU {gpu.index}", f"{gpu.name}, {gpu.memory / 1024:.0f} GiB", _driver_note(gpu))
        for gpu in gpus
    ]
    if not gpus:
        gpu_rows = [Row("driver", "no GPU", why_none or "")]
    if hidden := hidden_gpus():
        gpu_rows.append(Row("limited by", hidden))
    seen = _rows(steps, "GPUs")
    gpu_rows.append(Row("PyTorch uses", f"{len(seen)} GPU{'' if len(seen) == 1 else 's'}"))
    report.sections["GPUs and driver"] = [*gpu_rows, *of_torch]
    report.sections["compilers and headers"] = build
    report.sections["machine"] = machine

    report.problems += [Problem(text) for text in unusable]
    report.problems += _problems_of(told, known=report.problems)
    taken = _rows(steps, "device")
    if gpus and taken and taken[0].value == "CPU" and config.train.device == "auto" and not hidden:
        why = why_unused(gpus, {row.name: row.value for row in of_torch})
        report.problems.append(
            Problem(
                f"train.device=auto takes the CPU, and the driver lists {len(gpus)} GPUs: {why}; "
                "docs/gpu.md has the builds, train.device=cpu takes the CPU all the same"
            )
        )
    if any(row.value == "triton" for row in _rows(steps, "attention")) and (
        lacks := triton_lacks()
    ):
        report.problems.append(
            Problem(f"attention.backend=triton compiles for this GPU at its first use: {lacks}")
        )
    by_name = {package.name: package for package in OPTIONAL}
    report.missing += [
        f"{name}, {by_name[name].use}: {by_name[name].install}"
        for name in absent
        if gpus or not by_name[name].of_gpus
    ]
    report.missing += build_missing
    return report


def _driver_note(gpu: Any) -> str:
    return f"compute capability {gpu.capability}, driver {gpu.driver}"


def _rows(steps: dict[str, Any], name: str) -> list[Row]:
    return [Row(*row) for row in (steps.get(name) or {}).get("rows", [])]


def _taken(told: Told) -> Iterator[Row]:
    """What the trainer's functions chose, and where they could not."""
    for name, given in told.steps.items():
        if name in _ELSEWHERE:
            continue
        if "error" in given:
            yield Row(name, "CANNOT", given["error"])
        yield from _rows(told.steps, name)
    if told.died_in is not None:
        yield Row(told.died_in, "CANNOT", f"the process that decides it {told.how}")


def _error_of(told: Told, step: str) -> str | None:
    if told.died_in == step:
        return f"the process that imports it {told.how}"
    given = told.steps.get(step, {"error": "was not tried"})
    return given.get("error")


def _problems_of(told: Told, known: list[Problem]) -> list[Problem]:
    """What ended a step of `choices`; one cause is said once."""
    found: list[Problem] = []
    for name, given in told.steps.items():
        if "error" not in given or any(given["error"] in one.text for one in (*known, *found)):
            continue
        text = given["error"]
        if given.get("unforeseen"):
            text = f"{name}: {text}"
        found.append(Problem(text, given["kind"]))
    if told.died_in is not None:
        text = f"{told.died_in}: the process that decides it {told.how}"
        if not any(told.how in one.text for one in known):
            found.append(Problem(text))
    return found
