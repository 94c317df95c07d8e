"""A sample of the campaign of faults, and that the campaign itself can fail."""

import json
import os
import signal

import pytest

from benchmarks import faults
from benchmarks.fault_cases.case import Case


def test_a_sample_of_thirty_is_survived(tmp_path, capsys):
    """Some of each kind; `python -m benchmarks.faults` has all."""
    assert faults.main(["--sample", "30", "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "report.json").read_text())
    kinds = {kind: (survived, tried) for kind, survived, tried in report["rows"]}
    assert set(kinds) == {*faults.KINDS, "all"} and kinds["all"] == (30, 30)
    assert not any((tmp_path / "cases").iterdir())


def _wrong(folder, workshop):
    (folder / "left.txt").write_text("for who looks into it")
    return "the loss is another"


def _raises(folder, workshop):
    raise KeyError("step")


def _dies(folder, workshop):
    os.kill(os.getpid(), signal.SIGSEGV)


def _hangs(folder, workshop):
    signal.pause()


def _passes(folder, workshop):
    return None


@pytest.mark.parametrize(
    ("run", "apart", "problem"),
    [
        (_wrong, False, "the loss is another"),
        (_raises, True, "KeyError: 'step'"),
        (_dies, True, "the process ended with status -11"),
        (_hangs, True, "it took more than"),
    ],
)
def test_what_is_not_survived_is_reported(tmp_path, monkeypatch, capsys, run, apart, problem):
    monkeypatch.setattr(faults, "make_workshop", lambda folder: None)
    monkeypatch.setattr(faults, "SECONDS_APART", 1.0)
    monkeypatch.setattr(faults, "SECONDS_TO_START", 60.0 if run is not _hangs else 20.0)
    cases = [Case(kind="flip", name="a", run=run, apart=apart)]
    cases.append(Case(kind="flip", name="b", run=_passes, apart=apart))
    monkeypatch.setattr(faults, "all_cases", lambda workshop, seed: cases)
    assert faults.main(["--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert f"error: not survived: flip, a: {problem}" in err
    assert "| flip | 1 | 2 |" in out
    assert [path.name for path in (tmp_path / "cases").iterdir()] == ["0000"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["not survived"]) == 1


def test_a_sample_has_every_kind():
    cases = [
        Case(kind=kind, name=str(number), run=_passes)
        for kind in faults.KINDS
        for number in range(9)
    ]
    chosen = faults.sample(cases, 30, seed=0)
    assert len(chosen) == 30 and {case.kind for case in chosen} == set(faults.KINDS)
    assert chosen == [case for case in cases if case in chosen]
