"""The benchmarks' own instruments, and that each runs: sizes here are as small as can be."""

import argparse
import json

import pytest
import torch

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
    page = tmp_path / "page.md"
    page.write_text("<!-- begin name-cpu -->\n<!-- end name-cpu -->\n")
    args = argparse.Namespace(device="cpu", out=tmp_path / "out", page=page)
    table = markdown_table(("a", "b"), [(1, 2)])
    hand_over("name", args, table, [{"a": 1}], lambda axes: axes.plot([1, 2]))
    assert table in capsys.readouterr().out and table in page.read_text()
    assert json.loads((tmp_path / "out" / "name-cpu.json").read_text())["rows"] == [{"a": 1}]
    assert (tmp_path / "out" / "name-cpu.png").stat().st_size > 1000
