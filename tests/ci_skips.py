"""In CI a test that is skipped for want of something that CI must have is a failure.

A package that was not installed, or an index that was not reached, would otherwise take tests away
without a word. Skips for another reason have to be named here.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

# What a CI machine need not have, or what makes another machine skip.
MAY_BE_ABSENT = (
    "needs a GPU",
    "kernels are compiled here, not interpreted",  # with a GPU: tests/gpu runs them
    "the CPU platform is installed in this process",  # with a GPU: tests/gpu runs by itself
    "no released LLaVA answers in ",  # files that are not this project's
    "Transformer Engine is installed",
    "only Linux's kernel watches parents",
    "Triton's compiler comes for Linux",
)
_MAY_BE_ABSENT = re.compile("|".join(map(re.escape, MAY_BE_ABSENT)))


def in_ci() -> bool:
    """Whether tests run in CI, where every service sets CI=true."""
    return os.environ.get("CI", "").lower() in ("true", "1")


def _judged(report: Any) -> Any:
    """A report of a skip as a failure, where it must not be one."""
    if not in_ci() or report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return report
    where = report.longrepr
    reason = str(where[2] if isinstance(where, tuple) else where).removeprefix("Skipped: ")
    if _MAY_BE_ABSENT.search(reason):
        return report
    report.outcome = "failed"
    report.longrepr = (
        f"skipped ({reason}), which is a failure with CI=true: install what is missing, or name "
        "the reason in tests/ci_skips.py"
    )
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    """Judges skips of single tests and of fixtures."""
    return _judged((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    """Judges skips of whole modules (`importorskip`)."""
    return _judged((yield))
