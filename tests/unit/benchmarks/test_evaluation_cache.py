"""The benchmark of questions about the same images runs, and writes its section of the page."""

import json

import pytest

from benchmarks import evaluation_cache
from benchmarks.evaluation_cache import NEW_TOKENS, QUESTIONS, TOKENS, batches


def test_questions_are_those_of_the_comparison():
    asked = batches(images=3, size=16, vocabulary=2048)
    assert [len(batch.prompts) for batch in asked] == [16, 16, 16, 6]
    images = [image for batch in asked for image in batch.images]
    assert images == sorted(images) and all(images.count(n) == QUESTIONS for n in range(3))
    lengths = {len(prompt) for batch in asked for prompt in batch.prompts}
    assert TOKENS == (20, 40) and min(lengths) >= 20 and max(lengths) <= 40
    assert (QUESTIONS, NEW_TOKENS) == (18, 2)


def test_it_runs_and_reaches_the_page(tmp_path, monkeypatch):
    """On a small model, whose ratios say nothing: only the tokens must be the same."""
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs/performance.md"
    page.write_text("<!-- begin evaluation-cache-cpu -->\nold\n<!-- end evaluation-cache-cpu -->\n")
    monkeypatch.setattr(evaluation_cache, "ROOT", tmp_path)
    arguments = ["--size=tiny", "--layers=2", "--visual", "576", "--images=1", "--repeats=1"]
    assert evaluation_cache.main([*arguments, "--write-docs"]) in (0, 1)
    (row,) = json.loads((page.parent / "performance/evaluation-cache-cpu.json").read_text())["rows"]
    assert row["same"] and row["asked"] == 18 and row["asked_llava"] == 16
    assert all(row[name] > 0 for name in ("cached", "plain", "llava"))
    text = page.read_text()
    ran = "1 images, 18 questions, batches of 16; LLaVA: the first 16 of these questions."
    assert ran in text
    cells = [cell.strip() for cell in text.split("\n| 576 |")[1].split("|")]
    cached, _, llava, _, ratio = (float(cell) for cell in cells[:5])
    assert cached == pytest.approx(18 / row["cached"], abs=0.06)
    assert llava == pytest.approx(16 / row["llava"], abs=0.06)
    assert ratio == pytest.approx(18 / row["cached"] / (16 / row["llava"]), abs=0.06)
    assert "old" not in text and text.count("\n| 576 |") == 1
    assert "performance/evaluation-cache-cpu.png" in text
    assert "python -m benchmarks.evaluation_cache --size=tiny" in text


def test_a_number_of_rows_that_no_canvas_has(tmp_path):
    with pytest.raises(SystemExit, match="--visual 600 must be one of 576, 1728"):
        evaluation_cache.main(["--size=tiny", "--visual", "600", f"--out={tmp_path}"])
