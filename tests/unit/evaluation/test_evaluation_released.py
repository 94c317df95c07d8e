"""Scores and submissions of LLaVA-1.5-13B's released answers, against the released figures."""

import json
from collections import Counter

import pytest

from dattn_mcore.evaluation.__main__ import main
from dattn_mcore.evaluation.benchmarks import make_benchmark
from tests.unit.evaluation.trees import lines, put

ANSWERS = "answers/llava-v1.5-13b.jsonl"


def data_with(tmp_path, folder):
    """A data folder in which one benchmark's folder is the released one."""
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / folder.name).symlink_to(folder)
    return tmp_path / "val"


def test_scienceqa(released, tmp_path, capsys):
    folder = released / "scienceqa"
    data = data_with(tmp_path, folder)
    arguments = ["--benchmark=scienceqa", f"--data={data}", f"--answers={folder / ANSWERS}"]
    assert main(["score", *arguments, f"--json={tmp_path / 's.json'}"]) == 0
    assert "74.39%" in capsys.readouterr().out
    score = json.loads((tmp_path / "s.json").read_text())["scienceqa"]
    assert score["figures"]["right"] == 3155 and score["figures"]["of"] == 4241
    assert score["value"] == 100 * 3155 / 4241
    assert f"{score['value']:.4f}" == "74.3928"
    assert f"{score['figures']['IMG accuracy']:.4f}" == "71.6411"
    assert score["categories"]["with image (IMG)"]["rows"] == 2017


def test_scienceqa_prompts(released, tmp_path):
    """Ours are the released ones, to the letter."""
    benchmark = make_benchmark("scienceqa", data_with(tmp_path, released / "scienceqa"))
    answered = (released / "scienceqa" / ANSWERS).read_text().splitlines()
    prompts = {r["question_id"]: r["prompt"] for r in map(json.loads, answered)}
    assert {row.question_id: row.prompt for row in benchmark.rows} == prompts


@pytest.mark.parametrize(
    ("name", "folder", "file"),
    [("vizwiz", "vizwiz", "answers_upload"), ("mm-vet", "mm-vet", "results")],
)
def test_submissions(released, tmp_path, name, folder, file):
    """The very bytes that LLaVA uploaded."""
    data = data_with(tmp_path, released / folder)
    arguments = [f"--data={data}", f"--answers={released / folder / ANSWERS}"]
    assert main(["submit", f"--benchmark={name}", *arguments, f"--out={tmp_path}"]) == 0
    written = tmp_path / "llava-v1.5-13b.json"
    assert written.read_bytes() == (released / folder / file / written.name).read_bytes()


def test_llava_bench_review(released, tmp_path, capsys):
    path = released / "llava-bench-in-the-wild/reviews/llava-v1.5-13b-eval1.jsonl"
    arguments = ["--benchmark=llava-bench", f"--reviews={path}", f"--json={tmp_path / 's.json'}"]
    assert main(["score", *arguments]) == 0
    assert "72.83%" in capsys.readouterr().out
    score = json.loads((tmp_path / "s.json").read_text())["llava-bench"]
    tuples = [json.loads(line)["tuple"] for line in path.read_text().splitlines()]
    assert score["value"] == pytest.approx(
        100 * sum(t[1] for t in tuples) / sum(t[0] for t in tuples), rel=1e-12
    )
    assert {k: c["rows"] for k, c in score["categories"].items()} == {
        "llava_bench_complex": 28,
        "llava_bench_conv": 17,
        "llava_bench_detail": 15,
    }


def test_mme_conversion(released, tmp_path):
    """All 2,374 answers in 14 files, the two questions of an image one after the other.

    The real ground truth is not public: every first question is yes here, every second no.
    """
    records = [json.loads(x) for x in (released / "MME/llava_mme.jsonl").read_text().splitlines()]
    root = tmp_path / "val/MME"
    lines(root / "llava_mme.jsonl", records)
    truth = {}
    for number, record in enumerate(records):
        question = record["text"].split("\n")[0]
        ending = f"{' ' * (1 + number % 2)}Please answer yes or no."
        truth.setdefault(record["question_id"], []).append(
            f"{question}{ending}\t{('Yes', 'No')[number % 2]}\n"
        )
    for name, two in truth.items():
        task, _, image = name.partition("/")
        deep = "questions_answers_YN/" if "/" in image else ""
        stem = image.rpartition("/")[2].rpartition(".")[0]
        put(root / f"MME_Benchmark_release_version/{task}/{deep}{stem}.txt", "".join(two))
    arguments = [f"--data={tmp_path / 'val'}", f"--answers={released / 'MME' / ANSWERS}"]
    assert main(["submit", "--benchmark=mme", *arguments, f"--out={tmp_path / 'tool'}"]) == 0
    files = sorted((tmp_path / "tool/llava-v1.5-13b").glob("*.txt"))
    assert len(files) == 14
    given = Counter()
    for file in files:
        rows = [line.split("\t") for line in file.read_text().splitlines()]
        assert all(len(row) == 4 for row in rows) and len(rows) % 2 == 0
        assert all(a[0] == b[0] for a, b in zip(rows[::2], rows[1::2], strict=True))
        assert {(a[2], b[2]) for a, b in zip(rows[::2], rows[1::2], strict=True)} == {("Yes", "No")}
        given.update(row[3] for row in rows)
    answered = (released / "MME" / ANSWERS).read_text().splitlines()
    assert given == Counter(json.loads(line)["text"] for line in answered)
    assert sum(given.values()) == 2374
    assert main(["score", "--benchmark=mme", *arguments, f"--json={tmp_path / 's.json'}"]) == 0
    score = json.loads((tmp_path / "s.json").read_text())["mme"]
    # MME's calculation, written out once more over the files of its own tool.
    perception = 0.0
    for file in files:
        rows = [line.split("\t") for line in file.read_text().splitlines()]
        hits = [row[3].lower() == row[2].lower() for row in rows]
        both = [a and b for a, b in zip(hits[::2], hits[1::2], strict=True)]
        value = 100 * sum(hits) / len(hits) + 100 * sum(both) / len(both)
        assert score["categories"][file.stem]["value"] == pytest.approx(value, rel=1e-12)
        if file.stem in ("commonsense_reasoning", "code_reasoning", "text_translation"):
            continue
        perception += value if file.stem != "numerical_calculation" else 0.0
    assert score["value"] == pytest.approx(perception, rel=1e-12)


def test_mmbench(released, tmp_path):
    """796 of 1,176 questions by the rows that the file has; published as 67.7 %."""
    folder = released / "mmbench"
    answers = folder / "answers/mmbench_dev_20230712/llava-v1.5-13b.jsonl"
    for needed in (folder / "mmbench_dev_20230712.tsv", answers):
        if not needed.is_file():
            pytest.skip(f"no released LLaVA answers in {folder}: {needed.name} is not there")
    data = data_with(tmp_path, folder)
    arguments = ["--benchmark=mmbench", f"--data={data}", f"--answers={answers}"]
    assert main(["score", *arguments, f"--json={tmp_path / 's.json'}"]) == 0
    score = json.loads((tmp_path / "s.json").read_text())["mmbench"]
    assert f"{score['value']:.3f}" == "67.687"
    assert any("53 of 1176 questions have fewer rows" in note for note in score["notes"])
