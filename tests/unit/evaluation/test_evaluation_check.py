"""What `check` sees in a data tree: files that are no images, cut and doubled question files."""

import io

import pytest
from PIL import Image

from dattn_mcore.evaluation.__main__ import main
from dattn_mcore.evaluation.benchmarks import make_benchmark
from dattn_mcore.evaluation.check import check
from dattn_mcore.evaluation.images import Picture
from tests.unit.evaluation import trees


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_images_of_every_kind(tmp_path, kind):
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2)).save(buffer, kind)
    path = trees.put(tmp_path / "x.jpg", buffer.getvalue())  # whatever the name says
    assert Picture("x", path).fault() == Picture("x", buffer.getvalue()).fault() == ""


@pytest.mark.parametrize(
    ("content", "fault"),
    [(b"", "is empty"), (b"<!DOCTYPE html><html>", "begins with"), (b"version https", "begins wi")],
)
def test_files_that_are_no_images(tree, content, fault):
    """Downloads that failed: nothing, a page, a pointer of Git LFS."""
    trees.put(tree / "vizwiz/test/VizWiz_test_1.jpg", content)
    problems = check(make_benchmark("vizwiz", tree)).problems
    assert len(problems) == 1
    assert f"1 files are no images (first: VizWiz_test_1.jpg {fault}" in problems[0]


def test_an_encoded_image_that_is_none(tree):
    rows = [{**row, "image": "PGh0bWw+"} for row in trees.mmbench_rows()]
    trees.write_tsv(tree / "mmbench/mmbench_dev_20230712.tsv", rows, trees.MMBENCH_COLUMNS)
    assert "4 files are no images" in check(make_benchmark("mmbench", tree)).problems[0]


def test_rows_beside_the_released_file(tree, monkeypatch, capsys):
    """Usable, so no failure, but to be seen in the table's column of states."""
    benchmark = make_benchmark("vizwiz", tree)
    assert check(benchmark).state == "partial"
    arguments = ["check", f"--data={tree}", "--benchmarks=vizwiz"]
    assert main(arguments) == 0
    assert "partial" in capsys.readouterr().out
    for full, state in ((2, "complete"), (1, "larger")):
        monkeypatch.setattr(type(benchmark), "full_rows", full)
        assert check(benchmark).state == state


@pytest.mark.parametrize(
    ("name", "file"),
    [("pope", "pope/llava_pope_test.jsonl"), ("vizwiz", "vizwiz/llava_test.jsonl")],
)
def test_a_doubled_question_file(tree, name, file):
    path = tree / file
    path.write_text(path.read_text() * 2)
    finding = check(make_benchmark(name, tree))
    count = finding.rows // 2
    assert finding.problems == [f"{count} question ids stand twice (first: '0')"]
    assert finding.state == "1 problem"
