"""The examination: everything is looked at side by side, then put together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from dattn_mcore.config.load import to_dict
from dattn_mcore.config.schema import Config
from dattn_mcore.doctor.children import Child, ChildReport
from dattn_mcore.doctor.machine import build_rows, machine_rows, triton_lacks
from dattn_mcore.doctor.packages import MEGATRON, OPTIONAL, Packages
from dattn_mcore.doctor.report import Problem, Report, Row
from dattn_mcore.parallel.gpu_machine import DriverGpu, driver_gpus, hidden_gpus, why_unused

_CHOICES = "dattn_mcore.doctor.choices"
# Steps of `choices` whose rows stand in another table.
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
    build, build_missing = build_rows(has_gpus=bool(gpus))
    told = choices.told()
    rows, unusable, absent = packages.rows(_megatron(told))

    report = Report(subject)
    report.sections = {
        "what a run takes": list(_taken(told)),
        "packages": rows,
        "GPUs and driver": _gpu_rows(gpus, why_none, told),
        "compilers and headers": build,
        "machine": machine_rows(config),
    }
    report.problems = [Problem(text) for text in unusable]
    report.problems += _problems_of(told, report.problems)
    report.problems += [*_unused_gpus(config, gpus, told), *_no_compiler(told)]
    report.missing = [
        f"{package.name}, {package.use}: {package.install}"
        for package in OPTIONAL
        if package.name in absent and (gpus or not package.of_gpus)
    ]
    report.missing += build_missing
    return report


def _rows(told: ChildReport, step: str) -> list[Row]:
    return [Row(*row) for row in (told.steps.get(step) or {}).get("rows", [])]


def _taken(told: ChildReport) -> Iterator[Row]:
    """What the trainer's functions chose, and where they could not."""
    for name, given in told.steps.items():
        if name in _ELSEWHERE:
            continue
        if "error" in given:
            yield Row(name, "CANNOT", given["error"])
        for row in _rows(told, name):
            said = given["said"] if name == "device" else []  # why PyTorch uses no GPU
            yield Row(row.name, row.value, "; ".join([row.note, *said]))
    if told.died_in is not None:
        yield Row(told.died_in, "CANNOT", f"the process that decides it {told.how}")


def _gpu_rows(gpus: Sequence[DriverGpu], why_none: str | None, told: ChildReport) -> list[Row]:
    rows = [
        Row(
            f"GPU {gpu.index}",
            f"{gpu.name}, {gpu.memory / 1024:.0f} GiB",
            f"compute capability {gpu.capability}, driver {gpu.driver}",
        )
        for gpu in gpus
    ]
    if not gpus:
        rows = [Row("driver", "no GPU", why_none or "")]
    if hidden := hidden_gpus():
        rows.append(Row("limited by", hidden))
    used = _rows(told, "GPUs")
    rows.append(Row("PyTorch uses", f"{len(used)} GPU{'' if len(used) == 1 else 's'}"))
    return [*rows, *_rows(told, "PyTorch")]


def _megatron(told: ChildReport) -> dict[str, str | None]:
    """Megatron-Core's module and why it cannot be imported; empty where it was not tried."""
    if told.died_in == MEGATRON.name:
        return {MEGATRON.module: f"the process that imports it {told.how}"}
    if MEGATRON.name in told.steps:
        return {MEGATRON.module: told.steps[MEGATRON.name].get("error")}
    return {}


def _problems_of(told: ChildReport, known: Sequence[Problem]) -> list[Problem]:
    """What ended a step of `choices`; one cause is said once."""
    found: list[Problem] = []

    def said(text: str) -> bool:
        return any(text in one.text for one in (*known, *found))

    for name, given in told.steps.items():
        error: Any = given.get("error")
        if error is not None and not said(error):
            text = f"{name}: {error}" if given.get("unforeseen") else error
            found.append(Problem(text, given["kind"]))
    if told.died_in is not None and not said(told.how):
        found.append(Problem(f"{told.died_in}: the process that decides it {told.how}"))
    return found


def _unused_gpus(config: Config, gpus: Sequence[DriverGpu], told: ChildReport) -> Iterator[Problem]:
    """`auto` that takes the CPU beside GPUs which nobody has hidden."""
    taken = _rows(told, "device")
    if not gpus or hidden_gpus() or config.train.device != "auto":
        return
    if taken and taken[0].value == "CPU":
        build = {row.name: row.value for row in _rows(told, "PyTorch")}
        why = "; ".join([why_unused(gpus, build), *told.steps["device"]["said"]])
        yield Problem(
            f"train.device=auto takes the CPU, and the driver lists {len(gpus)} GPUs: {why}; "
            "docs/gpu.md says which builds fit, train.device=cpu takes the CPU all the same"
        )


def _no_compiler(told: ChildReport) -> Iterator[Problem]:
    """Triton without what it compiles with, which a run would meet in its first step."""
    chosen = any(row.value == "triton" for row in _rows(told, "attention"))
    if chosen and (lacks := triton_lacks()):
        yield Problem(f"attention.backend=triton compiles for this GPU at its first use: {lacks}")
