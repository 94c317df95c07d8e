"""Parts of `dattn doctor` in this process: versions, tables, and what a child says when it dies."""

import json
import sys
from pathlib import Path

import pytest

from dattn_mcore.doctor.children import Child
from dattn_mcore.doctor.imports import Imports
from dattn_mcore.doctor.machine import triton_lacks
from dattn_mcore.doctor.packages import OPTIONAL, allowed_range, within
from dattn_mcore.doctor.report import Problem, Report, Row
from dattn_mcore.parallel.gpu_machine import DriverGpu, headers, toolkit, why_unused

H100 = DriverGpu(0, "H100", "570.86.15", 81559, "9.0")


@pytest.mark.parametrize(
    ("version", "allowed", "holds"),
    [
        ("2.7", ">=2.7,<3", True),
        ("2.8.3.post2", ">=2.7,<3", True),
        ("2.6.3", ">=2.7,<3", False),
        ("3.0.0b1", ">=2.7,<3", False),
        ("0.16.1", "==0.16.1", True),
        ("0.16.10", "==0.16.1", False),
        ("2.13.0+cu130", ">=2.11,<2.14", True),
        ("2.14", ">=2.11,<2.14", False),
    ],
)
def test_versions_are_compared_by_their_numbers(version, allowed, holds):
    assert within(version, allowed) == holds


def test_ranges_are_those_of_the_metadata():
    from importlib.metadata import requires

    torch = next(line for line in requires("dattn-mcore") if line.startswith("torch"))
    assert sorted(torch.removeprefix("torch").split(",")) == sorted(
        allowed_range("torch").split(",")
    )
    assert "<3" in allowed_range("flash-attn") and allowed_range("no-such-package") == ""


def test_every_extra_that_a_command_names_is_there():
    project = (Path(__file__).resolve().parents[3] / "pyproject.toml").read_text()
    named = {one.install.split("[")[1].split("]")[0] for one in OPTIONAL if "[" in one.install}
    assert named == {"triton", "te", "flash", "dali", "parquet", "heif", "video", "adapters", "trackers"}
    assert all(f"\n{extra} = [" in project for extra in named)


def test_a_report_as_text_and_as_json():
    report = Report("x.yaml", host="node7", sections={"machine": [Row("a", "1", "word " * 60)]})
    assert report.as_text().endswith("\na run would start\n")
    assert max(map(len, report.as_text().splitlines())) <= 118
    report.problems = [Problem("GPU 1 does not\ncompute", "fault")]
    assert report.problem_lines() == "fault: GPU 1 does not\\ncompute\n"
    assert "a run would not start: 1 reason" in report.as_text()
    found = json.loads(report.as_json())
    assert (found["would_start"], found["host"]) == (False, "node7")


def test_a_module_that_ends_the_process_costs_the_others_nothing(tmp_path, monkeypatch):
    (tmp_path / "first_is_fine.py").write_text("print('to whom it concerns')\n")
    (tmp_path / "then_one_dies.py").write_text("import os; os.abort()\n")
    (tmp_path / "a_third_raises.py").write_text("raise AssertionError\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")
    found = Imports(["first_is_fine", "then_one_dies", "a_third_raises", "json"]).problems()
    assert found["first_is_fine"] is None and found["json"] is None
    assert found["then_one_dies"].startswith("its import was ended by SIGABRT")
    assert found["a_third_raises"] == "AssertionError: AssertionError"
    assert Imports([]).problems() == {}


def test_a_child_that_cannot_even_start_says_so():
    told = Child("dattn_mcore.no_such_module").told()
    assert told.died_in == "starting" and "No module named dattn_mcore.no_such" in told.how


@pytest.mark.parametrize(
    ("build", "why"),
    [
        ("none, a build for CPUs", "is a build for CPUs"),
        ("13.0", "needs a driver of 580 or newer, and this one is 570.86.15"),
        ("12.6", "restart the machine"),
    ],
)
def test_why_gpus_are_not_used(build, why):
    assert why in why_unused([H100], {"CU" + "DA of PyTorch": build})


def test_what_triton_lacks(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert triton_lacks().startswith("there is no C compiler; apt-get install gcc")
    monkeypatch.setenv("CC", "no-such-cc -m64")
    assert triton_lacks().startswith("CC=no-such-cc -m64 is not a command")


def test_a_toolkit_and_headers_are_found_where_a_compiler_looks(monkeypatch, tmp_path):
    nvcc, header = tmp_path / "bin/nvcc", tmp_path / "include/cudnn.h"
    for path in (nvcc, header):
        path.parent.mkdir()
        path.write_text("#!/bin/sh\necho 'Build tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CU" + "DA_HOME", str(tmp_path))
    assert (toolkit().version, toolkit().home) == ("13.0", tmp_path)
    assert {one.name: one.found for one in headers()}["cudnn.h"] == header
