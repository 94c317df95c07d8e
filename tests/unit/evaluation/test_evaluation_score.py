"""The digits score: counts, and files that do not belong together."""

import json

from dattn_mcore.evaluation.__main__ import main
from dattn_mcore.evaluation.digits_score import score_digits

QUESTIONS = [
    {"question_id": "a", "text": "?", "category": "cell", "answer": "7"},
    {"question_id": "b", "text": "?", "category": "cell", "answer": "3"},
    {"question_id": "c", "text": "?", "category": "where", "answer": "top-left"},
]
ANSWERS = [
    {"question_id": "c", "text": " top-left "},
    {"question_id": "a", "text": "7"},
    {"question_id": "b", "text": "13"},
]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_score(tmp_path, capsys):
    """Exact match per category and over all, as a table and as JSON."""
    questions = write(tmp_path / "q.jsonl", QUESTIONS)
    answers = write(tmp_path / "a.jsonl", ANSWERS)
    score = score_digits(questions, answers)
    assert (score.overall.correct, score.overall.total) == (2, 3)
    assert score.categories["cell"].accuracy == 0.5
    files = [f"--questions={questions}", f"--answers={answers}"]
    assert main(["score-digits", *files, f"--json={tmp_path / 'out.json'}"]) == 0
    out = capsys.readouterr().out
    assert "66.7%" in out and "50.0%" in out and "100.0%" in out
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["overall"] == {"correct": 2, "total": 3, "accuracy": 2 / 3}
    assert written["categories"]["where"]["accuracy"] == 1.0


def fails(tmp_path, capsys, questions, answers):
    """The one line of a score that cannot be made."""
    files = [
        f"--questions={write(tmp_path / 'q.jsonl', questions)}",
        f"--answers={write(tmp_path / 'a.jsonl', answers)}",
    ]
    assert main(["score-digits", *files]) == 2
    return capsys.readouterr().err.strip()


def test_files_that_do_not_belong_together(tmp_path, capsys):
    """Missing, extra and repeated ids, and questions without an answer."""
    assert "lacks 1 question ids ('b')" in fails(tmp_path, capsys, QUESTIONS, ANSWERS[:2])
    extra = [*ANSWERS, {"question_id": "z", "text": "1"}]
    assert "1 question ids ('z')" in fails(tmp_path, capsys, QUESTIONS, extra)
    assert ":4: question_id 'a' is answered twice" in fails(
        tmp_path, capsys, QUESTIONS, [*ANSWERS, ANSWERS[1]]
    )
    open_question = [*QUESTIONS[:2], {"question_id": "c", "text": "?"}]
    assert ":3: has no field answer" in fails(tmp_path, capsys, open_question, ANSWERS)
    assert "holds no questions" in fails(tmp_path, capsys, [], ANSWERS)
