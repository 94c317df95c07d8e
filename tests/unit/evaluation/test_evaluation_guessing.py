"""Every score beside guessing: levels from the questions themselves, bounds of luck, odd answers."""

import json
from math import comb

import numpy as np
import pytest

from dattn_mcore.evaluation.__main__ import main
from dattn_mcore.evaluation.benchmarks import make_benchmark
from dattn_mcore.evaluation.benchmarks.mmstar import MmStar
from dattn_mcore.evaluation.guessing import compare, count_choices, look_at, needed
from dattn_mcore.evaluation.outcome import Outcome
from tests.unit.evaluation import trees


@pytest.mark.parametrize(
    ("count", "chance", "fewest"),
    [(100, 0.5, 59), (20, 0.25, 9), (10, 0.5, 9), (5, 0.5, 5), (4, 0.5, 5), (40, 1 / 12, 7)],
)
def test_luck_is_the_binomial_distribution(count, chance, fewest):
    """The fewest right answers that guessing reaches in 5 % of all cases at most, by exact sums."""

    def at_least(right):
        return sum(
            comb(count, k) * chance**k * (1 - chance) ** (count - k)
            for k in range(right, count + 1)
        )

    assert needed([chance] * count) == fewest
    assert at_least(fewest) <= 0.05 < at_least(fewest - 1)


def test_luck_where_options_vary():
    """A sum of different draws, against a million of them; questions that cannot be right."""
    chances = [1 / 2] * 30 + [1 / 3] * 30 + [1 / 4] * 30 + [0.0] * 5 + [1.0] * 2
    dice = np.random.default_rng(0)
    right = (dice.random((200_000, len(chances))) < chances).sum(1)
    fewest = needed(chances)
    assert (right >= fewest).mean() < 0.05 < (right >= fewest - 1).mean()
    assert needed([0.0] * 3) == 1 and needed([1.0] * 3) == 4


def test_the_released_sizes():
    """By the normal approximation: the mean, 1.645 standard deviations, half a step."""
    for count, chance in ((1500, 0.25), (8910, 0.5), (19242, 0.25)):
        deviation = (count * chance * (1 - chance)) ** 0.5
        assert needed([chance] * count) == pytest.approx(
            count * chance + 1.645 * deviation + 1, abs=1.5
        )


def test_notes():
    (luck,) = compare("accuracy", [1.0] * 30 + [0.0] * 70, [0.25] * 100)
    assert (luck.right, luck.needed, luck.level, luck.better) == (30, 33, 25.0, False)
    assert luck.note() == (
        "accuracy is not better than guessing (30 of 100 right, 25.0% by luck; 33 would be)"
    )
    (skill,) = compare("accuracy", [1.0] * 33 + [0.0] * 67, [0.25] * 100)
    assert skill.better and skill.note() == ""
    (few,) = compare("binary", [1.0, 1.0], [0.5, 0.5])
    assert few.note() == (
        "binary: too few questions to tell it from guessing (2 of 2 right, 50.0% by luck)"
    )
    assert compare("binary", [], []) == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Where is it?\nOptions: A: x, B: y", 2),
        ("What is it?\nA. a\nB. b\nC. c\nD. d\nAnswer with", 4),
        ("Which?\n(A) one (B) two (C) three", 3),
        ("Is A left of B?", 4),
        ("Plan A: none.", 4),
        ("Options: A: 5., B: 6., C: I.D., D: 7., E: 8.", 5),
    ],
)
def test_options_are_counted_from_the_question(text, count):
    assert count_choices(text) == count


# What guessing gives on the small trees, by hand, and (figure, expected right answers) of each.
LEVELS = {
    "scienceqa": (100 * (1 / 2 + 1 / 3 + 1 / 2) / 3, [("accuracy", 4 / 3), ("IMG accuracy", 1)]),
    "mme": (150.0, [("perception", 4)]),
    "gqa": (None, [("binary", 0.5)]),
    "pope": (200 / 3, [("accuracy", 3)]),
    "textvqa": (None, []),
    "seed": (25.0, [("accuracy", 0.5)]),
    "mmbench": (25.0, [("circular accuracy", 0.5), ("accuracy in one pass", 1)]),
    "mmstar": (50.0, [("accuracy", 1)]),
}


@pytest.mark.parametrize("name", LEVELS)
def test_levels_of_the_benchmarks(tree, name):
    benchmark = make_benchmark(name, tree)
    score = benchmark.score(["A"] * len(benchmark.rows))
    level, figures = LEVELS[name]
    assert score.guessing == pytest.approx(level) if level else score.guessing is None
    found = [(guess.figure, guess.expected) for guess in score.guesses]
    assert [name for name, _ in found] == [name for name, _ in figures]
    assert [x for _, x in found] == pytest.approx([x for _, x in figures])


def test_always_yes_is_not_better_than_guessing(tree):
    """Though its F1 is 66.7: the accuracy is compared."""
    pope = make_benchmark("pope", tree)
    score = pope.score(["Yes"] * 6).looked_at(["Yes"] * 6)
    assert score.value == pytest.approx(score.guessing) == pytest.approx(200 / 3)
    assert "all 6 answers are the same ('Yes')" in score.notes
    assert any(
        note.startswith("accuracy is not better than guessing (3 of 6") for note in score.notes
    )
    right = ["Yes", "No"] * 3
    assert not any("guessing" in note for note in pope.score(right).looked_at(right).notes)


def test_odd_answers():
    """All empty, all the same, none right; from ten answers on the worst of it is a fault."""
    wrong, right = Outcome(0.0, "", ""), Outcome(1.0, "", "")
    assert look_at(["", " "], []) == (["all 2 answers are empty"], "")
    assert look_at([""] * 10, []) == (["all 10 answers are empty"], "all 10 answers are empty")
    notes, broken = look_at(["yes"] * 10, [right] * 5 + [wrong] * 5)
    assert (notes, broken) == (["all 10 answers are the same ('yes')"], "")
    assert look_at(["yes"] * 10, [right] * 10) == ([], "")
    notes, broken = look_at([str(i) for i in range(10)], [wrong] * 10)
    assert (notes, broken) == (["no answer is right"], "none of 10 answers is right")
    assert look_at([None] * 3 + ["a"], [wrong] * 3 + [right]) == ([], "")
    assert look_at(None, [Outcome(None, "failed", "")] * 20) == ([], "")
    assert look_at(None, [Outcome(0.1, "", "")] * 20) == ([], "")


def mmstar_of(root, count):
    """An MMStar of four options, whose answers are A, B, C, D in turn."""
    rows = [
        {
            "index": number,
            "question": f"Where is {number}?",
            "image": "aGVsbG8=",
            "answer": "ABCD"[number % 4],
            "category": "math",
            "l2_category": "geometry",
            **{letter: f"option {letter}" for letter in "ABCD"},
        }
        for number in range(count)
    ]
    trees.write_tsv(root / "mmstar/MMStar.tsv", rows, list(rows[0]))
    return rows


def score_mmstar(tmp_path, texts, capsys):
    """Status, table and JSON of the command `score`."""
    rows = mmstar_of(tmp_path, len(texts))
    records = [
        {"question_id": row["index"], "text": text} for row, text in zip(rows, texts, strict=True)
    ]
    answers = trees.lines(tmp_path / "answers.jsonl", records)
    command = ["score", "--benchmark=mmstar", f"--data={tmp_path}", f"--answers={answers}"]
    status = main([*command, f"--json={tmp_path / 'score.json'}"])
    table = " ".join(capsys.readouterr().out.split())
    return status, table, json.loads((tmp_path / "score.json").read_text())["mmstar"]


def test_the_command_says_when_a_score_is_luck(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(MmStar, "full_rows", 40)
    right = ["ABCD"[number % 4] for number in range(40)]
    status, table, found = score_mmstar(tmp_path, right[:16] + ["E"] * 24, capsys)
    assert status == 0 and found["value"] == 40 and found["guessing"] == 25
    assert found["compared"] == [
        {
            **{"figure": "accuracy", "right": 16, "total": 40, "expected": 10.0, "needed": 16},
            **{"guessing": 25.0, "better": True},
        }
    ]
    assert "note" not in found and "25.00%" in table
    status, table, found = score_mmstar(tmp_path, right[:15] + ["E"] * 25, capsys)
    note = "accuracy is not better than guessing (15 of 40 right, 25.0% by luck; 16 would be)"
    assert status == 0 and note in found["note"] and not found["compared"][0]["better"]
    assert "is not better than guessing" in table
    status, table, found = score_mmstar(tmp_path, [""] * 40, capsys)
    assert status == 1 and found["broken"] == "all 40 answers are empty"
    assert "all 40 answers are empty; no answer is right; accuracy is not better" in found["note"]
    status, _, found = score_mmstar(tmp_path, [f"E{number}" for number in range(40)], capsys)
    assert status == 1 and found["broken"] == "none of 40 answers is right"


def score_digits(tmp_path, capsys, right, total=48):
    """Status, output and JSON of `score-digits`, with so many right answers in each category."""
    questions, answers = [], []
    for category in ("cell", "line"):
        for number in range(total):
            name, truth = f"{category}-{number}", str(number)
            questions.append(
                {"question_id": name, "text": "?", "category": category, "answer": truth}
            )
            answers.append({"question_id": name, "text": truth if number < right else "x"})
    files = [
        f"--questions={trees.lines(tmp_path / 'q.jsonl', questions)}",
        f"--answers={trees.lines(tmp_path / 'a.jsonl', answers)}",
    ]
    status = main(["score-digits", *files, f"--json={tmp_path / 'score.json'}"])
    return status, capsys.readouterr().out, json.loads((tmp_path / "score.json").read_text())


def test_digits_beside_guessing(tmp_path, capsys):
    """A guess that knows which digits there are, but not where: 1 in 4, of a line 1 in 12."""
    status, out, found = score_digits(tmp_path, capsys, right=12)
    levels = {guess["figure"]: guess["guessing"] for guess in found["compared"]}
    assert levels == pytest.approx({"cell": 25, "line": 100 / 12, "overall": 100 / 6})
    better = {guess["figure"]: guess["better"] for guess in found["compared"]}
    assert better == {"cell": False, "line": True, "overall": True} and status == 0
    assert "note: cell is not better than guessing (12 of 48 right" in out
    assert "8.3%" in out and "16.7%" in out and "line is not better" not in out
    status, out, found = score_digits(tmp_path, capsys, right=0)
    assert status == 1 and found["broken"] == "none of 96 answers is right"
    assert "note: no answer is right" in out and "overall is not better than guessing" in out
    status, out, found = score_digits(tmp_path, capsys, right=48)
    assert status == 0 and found["notes"] == [] and "note:" not in out
