"""The benchmark of context parallelism's traffic runs, writes what it found, and says what is wrong."""

import json

import pytest

from benchmarks import context_traffic

SMALL = ["--ranks", "2", "--visual", "100", "--text", "32", "--heads", "2", "--layers", "1"]


def test_it_counts_and_writes_its_page(tmp_path, capsys, monkeypatch):
    page = tmp_path / "context-parallel.md"
    sections = ("context-traffic", "context-traffic-real")
    page.write_text("".join(f"<!-- begin {s} -->\nNot yet.\n<!-- end {s} -->\n" for s in sections))
    monkeypatch.setattr(context_traffic, "PAGE", page)
    assert context_traffic.main([*SMALL, "--write-docs"]) == 0
    data = json.loads((tmp_path / "performance" / "context-traffic-cpu.json").read_text())
    (row,) = data["rows"]
    assert row["problems"] == [] and len(row["attention"]) == row["ranks"] == 2
    # 16 text rows to the other rank; float32, 2 heads of 16 and 1 group.
    assert row["attention"][0]["forward"] == 16 * 4 * (32 + 32 + 32 + 2)
    assert (tmp_path / "performance" / "context-traffic-cpu.png").stat().st_size > 1000
    text = page.read_text()
    assert "Not yet" not in text and "| Mistral 7B | 100,000 | 21.1 | 1,030.6 |" in text
    assert "| 2 | 100 | " in text and "| 2 | 100 | " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--device", "gpu"], "on processes of a CPU"),
        (["--visual", "150"], "--visual 150: must be a multiple of 100"),
        (["--text", "40"], "--text 40: must be a multiple of 16"),
        (["--ranks", "3", "--text", "48"], "together they must be a multiple of 6"),
    ],
)
def test_sizes_that_cannot_be_measured_are_one_line(more, said, capsys):
    with pytest.raises(SystemExit):
        context_traffic.main([*SMALL, *more])
    assert said in capsys.readouterr().err
