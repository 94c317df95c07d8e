"""The benchmarks' own instruments, and that each runs: sizes here are as small as can be."""

import argparse
import json
import sys

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.measure import peak_bytes, seconds_in_turn
from benchmarks.results import hand_over, markdown_table, write_section

CPU = torch.device("cpu")


def test_peak_counts_what_lives_at_the_same_time():
    def one_after_the_other():
        for _ in range(3):
            torch.ones(1000, dtype=torch.float64)

    def together():
        return [torch.ones(1000, dtype=torch.float64) for _ in range(3)]

    assert peak_bytes(one_after_the_other, CPU) == pytest.approx(8000, abs=200)
    assert peak_bytes(together, CPU) == pytest.approx(24000, abs=500)


def test_functions_take_turns():
    calls = []
    times = seconds_in_turn({name: lambda n=name: calls.append(n) for name in "ab"}, 2, CPU)
    assert calls == list("ababab") and set(times) == {"a", "b"}


def test_a_section_of_the_page_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- begin x -->\nold\n<!-- end x -->\nbelow\n")
    write_section(page, "x", "new\n")
    assert page.read_text() == "above\n<!-- begin x -->\nnew\n<!-- end x -->\nbelow\n"
    with pytest.raises(ValueError, match="no section y"):
        write_section(page, "y", "new\n")


def test_what_is_handed_over(tmp_path, capsys):
    args = argparse.Namespace(device="cpu", out=tmp_path / "out")
    table = markdown_table(("a", "b"), [(1, 2)])
    hand_over("name", args, table, [{"a": 1}], lambda axes: axes.plot([1, 2]))
    assert table in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "name-cpu.json").read_text())["rows"] == [{"a": 1}]
    assert (tmp_path / "out" / "name-cpu.png").stat().st_size > 1000


def test_the_page_gets_tables_and_says_what_failed(tmp_path, monkeypatch):
    script = tmp_path / "good.py"
    script.write_text("print('words')\nprint('| a |')\nprint('| --- |')\nprint('| 1 |')\n")
    plan = {
        "good": [sys.executable, str(script)],
        "bad": [sys.executable, "-c", "raise SystemExit('no memory left')"],
    }
    monkeypatch.setattr(gpu_check, "commands", lambda device: plan)
    page = tmp_path / "page.md"
    sections = "".join(f"<!-- begin {n}-cpu -->\n<!-- end {n}-cpu -->\n" for n in plan)
    page.write_text(sections)
    assert gpu_check.main(["--device", "cpu", "--page", str(page)]) == 1
    good, bad = page.read_text().split("<!-- end good-cpu -->")
    assert "| a |\n| --- |\n| 1 |\n" in good and "words" not in good and "good.py`" in good
    assert "failed (exit status 1): no memory left" in bad


def test_the_page_has_a_section_for_every_table():
    text = gpu_check.PAGE.read_text()
    for device in ("cpu", "gpu"):
        for name in gpu_check.commands(device):
            assert f"<!-- begin {name}-{device} -->" in text
            assert f"<!-- end {name}-{device} -->" in text
