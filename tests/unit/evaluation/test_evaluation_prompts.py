"""Answers of another benchmark are refused, also where the ids are the same."""

import itertools
import json

import pytest

from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.__main__ import main
from dattn_mcore.evaluation.answer_files import read_answers_for
from dattn_mcore.evaluation.benchmarks import ALL
from dattn_mcore.evaluation.prompts import same_question
from tests.unit.evaluation import trees


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is it?\nAnswer the question using a single word or phrase.", "What is it?", True),
        ("What is it?\nReference OCR token: a, b", "<image>\nwhat  is\nit?", True),
        ("Look.\nWhat is it?\nA. cat\nB. dog", "What is it?\n(A) dog\n(B) cat", True),
        ("What is it?", "What is this?", False),
        ("Is it red?", "Is it redder?", False),
        ("A. cat\nB. dog", "A. cat\nB. dog", True),  # nothing but choices
        ("A. cat\nB. dog", "A. red\nB. blue", False),
    ],
)
def test_same_question(one, other, same):
    assert same_question(one, other) is same_question(other, one) is same


def test_every_pair_of_benchmarks(tmp_path):
    """Answers fit their own benchmark and no other; without prompts only the ids can tell."""
    data = trees.make_tree(tmp_path / "val")
    benchmarks = [kind(data) for kind in ALL]
    files = {}
    for benchmark in benchmarks:
        records = [
            {"question_id": row.question_id, "prompt": row.prompt, "text": "A"}
            for row in benchmark.rows
        ]
        files[benchmark.name] = trees.lines(tmp_path / f"{benchmark.name}.jsonl", records)
        assert read_answers_for(benchmark, files[benchmark.name]) == ["A"] * len(records)
    by_prompt = 0
    for asked, answered in itertools.permutations(benchmarks, 2):
        with pytest.raises(DataError, match="they belong to another benchmark") as raised:
            read_answers_for(asked, files[answered.name])
        by_prompt += "prompts ask something else" in str(raised.value)
    assert by_prompt >= 10  # in many pairs all ids are there


def test_a_few_other_prompts_are_left_alone(tree, tmp_path):
    """A question that was reworded does not make it another benchmark; an empty file is none."""
    benchmark = next(kind for kind in ALL if kind.name == "llava-bench")(tree)
    records = [
        {"question_id": r.question_id, "prompt": r.prompt, "text": "A"} for r in benchmark.rows
    ]
    records[0]["prompt"] = "Reworded."
    path = trees.lines(tmp_path / "a.jsonl", records)
    assert read_answers_for(benchmark, path) == ["A"] * 3
    records[1]["prompt"] = "Reworded, too."
    with pytest.raises(DataError, match="2 of 3 prompts ask something else than LLaVA-Bench does"):
        read_answers_for(benchmark, trees.lines(path, records))
    with pytest.raises(DataError, match="holds no answers"):
        read_answers_for(benchmark, trees.lines(path, []))


def test_released_answers_of_another(released, tmp_path, capsys):
    """The first 218 VizWiz answers have MM-Vet's ids, and are refused in one line."""
    answers = (released / "vizwiz/answers/llava-v1.5-13b.jsonl").read_text().splitlines()[:218]
    path = trees.lines(tmp_path / "a.jsonl", [json.loads(line) for line in answers])
    arguments = ["--benchmark=mm-vet", f"--data={released}", f"--answers={path}"]
    assert main(["submit", *arguments, f"--out={tmp_path / 'out'}"]) == 2
    error = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(error) == 1 and "of 218 prompts ask something else than MM-Vet does" in error[0]
    assert not (tmp_path / "out").exists()
