"""No score leaves out a question or a row without a word: every benchmark's scorer."""

import json

import pytest

from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.__main__ import main
from dattn_mcore.evaluation.benchmarks import ALL, Options, make_benchmark
from tests.unit.evaluation import trees

SCORED = [kind for kind in ALL if kind.scores and not kind.judged]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", SCORED, ids=lambda kind: kind.name)
def test_a_part_of_the_released_questions_says_so(tree, tmp_path, kind):
    """A question file that was cut gives a score that must not pass for the benchmark's."""
    benchmark = kind(tree)
    count = len(benchmark.rows)
    note = f"{count} rows; the released file has {kind.full_rows}"
    assert benchmark.coverage() == [note]
    records = [
        {"question_id": row.question_id, "prompt": row.prompt, "text": f"A{number}"}
        for number, row in enumerate(benchmark.rows)
    ]
    answers = trees.lines(tmp_path / "a.jsonl", records)
    arguments = [f"--benchmark={kind.name}", f"--data={tree}", f"--answers={answers}"]
    assert main(["score", *arguments, f"--json={tmp_path / 's.json'}"]) == 0
    found = json.loads((tmp_path / "s.json").read_text())[kind.name]
    assert note in found["notes"] and note in found["note"]


@pytest.mark.parametrize("kind", SCORED, ids=lambda kind: kind.name)
def test_all_of_the_released_questions_say_nothing(tree, monkeypatch, kind):
    benchmark = kind(tree)
    monkeypatch.setattr(kind, "full_rows", len(benchmark.rows))
    assert benchmark.coverage() == []


def test_rows_that_an_option_leaves_out_are_no_cut_file(tree, monkeypatch):
    benchmark = make_benchmark("seed", tree, Options(seed_images_only=True))
    monkeypatch.setattr(type(benchmark), "full_rows", 2)
    assert len(benchmark.rows) == 1 and benchmark.coverage() == []


def test_a_doubled_question_says_so(tree):
    path = tree / "pope/llava_pope_test.jsonl"
    trees.lines(path, [*read(path), read(path)[0]])
    assert "1 question ids stand twice (first: '0')" in make_benchmark("pope", tree).coverage()


@pytest.mark.parametrize(
    ("unanswered", "f1"),
    [
        ([], 100),
        ([1], 200 / 3),  # no is right: as bad as a yes, precision 1/2 and recall 1
        ([0], 0),  # yes is right: nothing is found
    ],
)
def test_pope_counts_rows_without_an_answer_as_wrong(tree, unanswered, f1):
    """Rows where no is right are in precision too: without them it would be 1."""
    answers = [None if i in unanswered else ("Yes", "No")[i % 2] for i in range(6)]
    result = make_benchmark("pope", tree).score(answers)
    assert result.categories["random"].value == pytest.approx(f1)
    assert result.categories["popular"].value == 100
    assert result.figures["random yes ratio"] == 50 * (0 not in unanswered)


def test_pope_labels_that_contradict(tree):
    """Of two labels for one question, one would be left out."""
    path = tree / "pope/coco/coco_pope_random.json"
    labels = read(path)
    trees.lines(path, [*labels, labels[0]])
    assert make_benchmark("pope", tree).score(["Yes", "No"] * 3).value == 100
    trees.lines(path, [*labels, {**labels[0], "label": "no"}])
    with pytest.raises(DataError, match="yes and no for image 'COCO_val2014_0.jpg', 'Is there"):
        make_benchmark("pope", tree).score(["Yes", "No"] * 3)


@pytest.mark.parametrize("category", ["", "existense", "Existence"])
def test_mme_categories_that_no_score_holds(tree, category):
    path = tree / "MME/llava_mme.jsonl"
    records = read(path)
    for record in records[:2]:
        record["category"] = category
    trees.lines(path, records)
    with pytest.raises(DataError, match=f"has category '{category}'; it must be one of existence"):
        make_benchmark("mme", tree).score(["Yes", "No"] * 4)


def test_mme_pairs_of_two_categories(tree):
    """The second question would be counted in the task of the first."""
    path = tree / "MME/llava_mme.jsonl"
    records = read(path)
    records[1]["category"] = "count"
    trees.lines(path, records)
    with pytest.raises(DataError, match="questions of two categories, existence and count"):
        make_benchmark("mme", tree).score(["Yes", "No"] * 4)


def test_seed_kinds_that_no_figure_holds(tree):
    path = tree / "seed_bench/SEED-Bench.json"
    value = json.loads(path.read_text())
    value["questions"][1]["data_type"] = "Video"
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match="data_type is 'Video'; it must be image or video"):
        make_benchmark("seed", tree).score(["A", "B"])


def test_scienceqa_problems_that_are_not_asked(tree):
    """Counted wrong, as in the original, also where another problem is asked twice."""
    path = tree / "scienceqa/llava_test_CQM-A.json"
    records = json.loads(path.read_text())
    path.write_text(json.dumps([records[0], records[0], records[2]]))
    result = make_benchmark("scienceqa", tree).score(["A", "A", "A"])
    assert result.value == 75 and result.figures["of"] == 4
    assert (
        "1 problems of the split are not asked; they count as wrong in the accuracy"
        in (result.notes[0])
    )
