"""POPE: figures by hand, labels of two releases, labels out of order."""

import json

import pytest

from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.benchmarks import Options, make_benchmark
from tests.unit.evaluation import trees


def score(tree, name, answers, **options):
    return make_benchmark(name, tree, Options(**options)).score(answers)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pope(tree):
    perfect = score(tree, "pope", ["Yes", "No"] * 3)
    assert perfect.value == 100 and perfect.figures["random yes ratio"] == 50
    # all yes: precision 1/2, recall 1
    result = score(tree, "pope", ["Yes", "Yes"] * 3)
    assert result.value == pytest.approx(200 / 3)
    assert result.figures["popular accuracy"] == 50 and result.figures["popular recall"] == 100
    nothing = score(tree, "pope", ["No", "No"] * 3)
    assert nothing.value == 0 and nothing.figures["random precision"] == 0  # undefined, no crash


def test_pope_labels_out_of_order(tree):
    """Joined by image and question: the order of the label file does not matter."""
    path = tree / "pope/coco/coco_pope_random.json"
    trees.lines(path, read(path)[::-1])
    answers = ["Yes", "No"] * 3
    assert score(tree, "pope", answers).value == 100
    original = score(tree, "pope", answers, as_original=True)
    assert original.categories["random"].value == 0  # by position: silently wrong
    assert original.categories["popular"].value == 100
    assert any("joined by position" in note for note in original.notes)


def test_pope_files_of_both_releases(tree):
    """2,910 questions with the 3,000 labels of the newer `random`, inserted in between."""
    path = tree / "pope/coco/coco_pope_random.json"
    rows, questions = [], []
    for number in range(3000):
        image = f"COCO_val2014_{number // 6}.jpg"
        text = f"Is there a thing {number} in the image?"
        label = "yes" if number % 2 == 0 else "no"
        rows.append({"question_id": number + 1, "image": image, "text": text, "label": label})
        if number % 100 >= 3:  # 2,910 of them
            questions.append(
                {
                    "question_id": number,
                    "image": image,
                    "text": text + trees.SHORT_ANSWER,
                    "category": "random",
                }
            )
    assert len(questions) == 2910
    trees.lines(path, rows)
    trees.lines(tree / "pope/llava_pope_test.jsonl", questions)
    answers = ["Yes" if q["question_id"] % 2 == 0 else "No" for q in questions]
    result = score(tree, "pope", answers)
    assert result.value == 100
    assert "random: 2910 rows are asked, the label file has 3000" in result.notes
    assert score(tree, "pope", answers, as_original=True).value < 60
    trees.lines(path, rows[:2910])
    with pytest.raises(DataError, match="has no label for image"):
        score(tree, "pope", answers)
    trees.lines(path, rows[:2000])
    with pytest.raises(DataError, match="2000 labels for 2910 rows"):
        score(tree, "pope", answers, as_original=True)


@pytest.mark.parametrize("old_side", ["questions", "labels"])
def test_pope_questions_and_labels_of_two_releases(tree, old_side):
    """One says "imange" where the other, corrected, says "image"."""
    files = {"questions": "pope/llava_pope_test.jsonl", "labels": "pope/coco/coco_pope_random.json"}
    path = tree / files[old_side]
    records = read(path)
    assert records[0]["text"].startswith("Is there a random thing 0 in the image?")
    records[0]["text"] = records[0]["text"].replace("in the image?", "in the imange?")
    trees.lines(path, records)
    assert score(tree, "pope", ["Yes", "No"] * 3).value == 100


@pytest.mark.parametrize(
    ("word", "release"),
    [
        ("imange", "of the first release (2,910 rows of random, with 'imange' in 1 of 6)"),
        ("image", "of the corrected release (3,000 rows of random, no 'imange')"),
    ],
)
def test_pope_names_the_release_of_its_questions(tree, word, release):
    path = tree / "pope/llava_pope_test.jsonl"
    records = read(path)
    records[0]["text"] = records[0]["text"].replace("image", word).replace("thing 0", "thing 7")
    trees.lines(path, records)
    with pytest.raises(DataError, match="has no label for image") as caught:
        score(tree, "pope", ["Yes", "No"] * 3)
    assert release in str(caught.value)
