"""What `check` sees in a data tree: files that are no images, cut and doubled question files."""

import io
import json

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


QUESTIONS = {
    "mme": "MME/llava_mme.jsonl",
    "gqa": "gqa/llava_gqa_testdev_balanced.jsonl",
    "pope": "pope/llava_pope_test.jsonl",
    "textvqa": "textvqa/llava_textvqa_val_v051_ocr.jsonl",
    "seed": "seed_bench/llava-seed-bench.jsonl",
    "llava-bench": "llava-bench-in-the-wild/questions.jsonl",
    "mm-vet": "mm-vet/llava-mm-vet.jsonl",
    "vqav2": "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl",
    "vizwiz": "vizwiz/llava_test.jsonl",
}
# Labels, descriptions and the server's file go by the image: there it cannot be missing.
BY_IMAGE = {
    "pope": "has no label for image ''",
    "llava-bench": "question 0 has no image; the judge reads its description",
    "vizwiz": "question 0 has no image",
}


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("name", QUESTIONS)
def test_a_row_without_an_image(tree, name, missing):
    """It is asked as text alone, or is one problem that names it."""
    path = tree / QUESTIONS[name]
    first, *others = [json.loads(line) for line in path.read_text().splitlines()]
    first["image"] = None
    if missing:
        del first["image"]
    trees.lines(path, [first, *others])
    benchmark = make_benchmark(name, tree)
    finding = check(benchmark)
    if name in BY_IMAGE:
        assert len(finding.problems) == 1 and BY_IMAGE[name] in finding.problems[0]
        return
    assert not finding.problems and "1 rows have no image" in finding.notes
    assert benchmark.rows[0].pictures == () and "<image>" not in benchmark.rows[0].text
    assert benchmark.rows[1].text.startswith("<image>\n")
