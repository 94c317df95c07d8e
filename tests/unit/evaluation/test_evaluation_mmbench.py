"""MMBench: prompts, rotations, the Chinese file, the submission."""

import pytest
from openpyxl import load_workbook

from dattn_mcore.errors import ConfigError, DataError
from dattn_mcore.evaluation.answer_files import AnswerStore
from dattn_mcore.evaluation.benchmarks import make_benchmark
from dattn_mcore.evaluation.check import check
from tests.unit.evaluation import trees

FILE = "mmbench/mmbench_dev_20230712.tsv"


def score(tree, name, answers):
    return make_benchmark(name, tree).score(answers)


def test_mmbench_prompt(tree):
    """Hint, question, options up to the first that is missing; the suffix is not saved."""
    rows = make_benchmark("mmbench", tree).rows
    assert rows[1].prompt == "Look closely.\nWhich is 1?\nA. cat\nB. dog"
    assert rows[0].prompt.startswith("Which is 0?")  # its hint is "nan"
    assert rows[0].text == f"<image>\n{rows[0].prompt}{trees.LETTER_ANSWER}"
    assert rows[0].extra["options"] == ["cat", "dog"]


def test_mmbench_circular(tree):
    """Right only if right in every rotation."""
    right = ["A", "A.", "B", "dog is wrong"]
    result = score(tree, "mmbench", right)
    assert result.metric == "circular accuracy" and result.value == 50
    assert result.figures == {"accuracy in one pass": 100, "base questions": 2}
    assert score(tree, "mmbench", ["cat", "The answer is A", "(B)", "Cat."]).value == 100


def test_a_question_without_all_its_rotations_counts_by_the_others(tree):
    path = tree / FILE
    trees.write_tsv(path, trees.mmbench_rows()[:3], trees.MMBENCH_COLUMNS)
    result = score(tree, "mmbench", ["A", "A", "B"])
    assert result.value == 100 and sum(b.count for b in result.categories.values()) == 2
    assert "1 of 2 questions have fewer rows than options; the rows that the file has" in (
        " ".join(result.notes)
    )
    assert result.guessing == pytest.approx(100 * (1 / 4 + 1 / 2) / 2)
    assert score(tree, "mmbench", ["A", "B", "B"]).value == 50
    assert score(tree, "mmbench", ["B", "A", "B"]).value == 50
    trees.write_tsv(path, trees.mmbench_rows()[:2], trees.MMBENCH_COLUMNS)
    once = score(tree, "mmbench", ["A", "B"])
    assert (once.metric, once.value) == ("accuracy", 50)
    assert any("no question has more than one rotation" in note for note in once.notes)


def test_the_one_pass_holds_every_question(tree):
    """Also one whose first rotation the file lacks, by the row that is there."""
    trees.write_tsv(tree / FILE, trees.mmbench_rows()[1:], trees.MMBENCH_COLUMNS)
    result = score(tree, "mmbench", ["A", "B", "A"])  # rows of question 1, 0, 1
    assert result.figures == {"accuracy in one pass": 100, "base questions": 2}
    assert result.value == 50


def released_shape(tree):
    """Rows as many as in the released file: 4,377 to 1,176 questions, of which 53 lack one.

    Returns:
        Options and rows of each question.
    """
    shapes = [(4, 3)] * 53 + [(4, 4)] * 986 + [(2, 2)] * 137
    rows = []
    for base, (options, count) in enumerate(shapes):
        for rotation in range(count):
            row = {"index": base + rotation * 1_000_000, "question": f"Which is {base}?"}
            row |= {letter: f"option {letter}" for letter in "ABCD"[:options]}
            rows.append({**row, "answer": "A", "category": "identity", "image": "aGVsbG8="})
    assert (len(shapes), len(rows)) == (1176, 4377)
    trees.write_tsv(tree / FILE, rows, trees.MMBENCH_COLUMNS)
    return shapes, rows


def test_the_figure_of_the_released_answers(tree):
    """796 of 1,176 questions right, 22 of them among the 53: 67.687 %, published as 67.7 %."""
    shapes, rows = released_shape(tree)
    right = {*range(22), *range(53, 53 + 774)}
    answers = []
    for row in rows:
        base, rotation = row["index"] % 1_000_000, row["index"] // 1_000_000
        last = rotation == shapes[base][1] - 1
        answers.append("A" if base in right or not last else "B")
    result = score(tree, "mmbench", answers)
    assert f"{result.value:.3f}" == "67.687"
    assert any("53 of 1176 questions have fewer rows" in note for note in result.notes)
    assert sum(bar.count for bar in result.categories.values()) == 1176
    assert not make_benchmark("mmbench", tree).coverage()


CHINESE = {"question": "图中是什么？", "hint": "请仔细看图。", "A": "猫", "B": "狗"}


def chinese_tree(tree, name="mmbench_dev_cn_20231003.tsv"):
    (tree / FILE).unlink()
    rows = [{**row, **CHINESE} for row in trees.mmbench_rows()]
    for row in rows[2:]:
        row["A"], row["B"] = row["B"], row["A"]
    trees.write_tsv(tree / "mmbench" / name, rows, trees.MMBENCH_COLUMNS)
    return make_benchmark("mmbench", tree)


@pytest.mark.parametrize("name", ["mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv", "dev.tsv"])
def test_mmbench_cn_is_asked_in_chinese(tree, name):
    """As LLaVA's model_vqa_mmbench.py with --lang cn; decided by the questions, not by the name."""
    benchmark = chinese_tree(tree, name)
    row = benchmark.rows[0]
    assert row.prompt == "请仔细看图。\n图中是什么？\nA. 猫\nB. 狗"
    assert row.text == f"<image>\n{row.prompt}\n请直接回答选项字母。"
    assert benchmark.check_truth() == [f"file {name}, asked in Chinese"]
    result = benchmark.score(["A", "A。", "选项B", "（Ｂ）狗"])
    assert result.value == 100 and f"file {name}, asked in Chinese" in result.notes
    assert benchmark.score(["答案是A", "猫", "答案：B", "猫。"]).value == 100
    assert check(benchmark).state == "usable" and not benchmark.coverage()


def test_mmbench_is_asked_in_english(tree):
    benchmark = make_benchmark("mmbench", tree)
    assert benchmark.check_truth() == ["file mmbench_dev_20230712.tsv, asked in English"]
    rows = trees.mmbench_rows()
    rows[0]["question"] = "What does the sign 出口 say?"  # one of four
    trees.write_tsv(tree / FILE, rows, trees.MMBENCH_COLUMNS)
    again = make_benchmark("mmbench", tree)
    assert {row.suffix for row in again.rows} == {trees.LETTER_ANSWER}


def test_answers_to_the_english_suffix_are_not_taken_for_chinese_ones(tree, tmp_path):
    """The suffix is not saved with the prompt: the language is."""
    benchmark = chinese_tree(tree)
    decoding = {"max_new_tokens": 4}
    old = AnswerStore(tmp_path, benchmark, "model", decoding)
    trees.lines(old.whole, [old.line(0, "A")])
    new = AnswerStore(tmp_path, benchmark, "model", {**decoding, **benchmark.asked_with()})
    with pytest.raises(DataError, match="'language': 'Chinese'.*answer again"):
        new.read()
    trees.lines(new.whole, [new.line(0, "A")])
    assert list(new.read()) == [0]


def test_mmbench_rows_that_stand_twice(tree):
    """Two rows of one index are no two rotations."""
    rows = trees.mmbench_rows()
    rows[2]["index"] = 0
    path = tree / "mmbench/mmbench_dev_20230712.tsv"
    trees.write_tsv(path, rows, trees.MMBENCH_COLUMNS)
    with pytest.raises(DataError, match="row 4 has index 0, as row 2 has"):
        score(tree, "mmbench", ["A"] * 4)


def test_mmbench_with_answers_to_some_rows(tree):
    """Neither the test split nor a file to score; what it is asked can still be answered."""
    rows = trees.mmbench_rows()
    rows[1]["answer"] = ""
    path = tree / "mmbench/mmbench_dev_20230712.tsv"
    trees.write_tsv(path, rows, trees.MMBENCH_COLUMNS)
    benchmark = make_benchmark("mmbench", tree)
    with pytest.raises(DataError, match=r"1 of 4 rows have no answer \(first: index 1\)"):
        benchmark.score(["A"] * 4)
    assert "1 of 4 rows have no answer" in check(benchmark).problems[0]


def test_mmbench_submission_that_fails(tree, tmp_path, monkeypatch):
    """A full disk leaves the file of before, and nothing half."""
    from openpyxl import Workbook

    benchmark = make_benchmark("mmbench", tree)
    path = benchmark.submit(["A"] * 4, tmp_path / "out", "m")
    before = path.read_bytes()

    def full(book, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Workbook, "save", full)
    with pytest.raises(DataError, match="No space left"):
        benchmark.submit(["B"] * 4, tmp_path / "out", "m")
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_mmbench_submission(tree, tmp_path):
    """Columns as LLaVA writes them; an answer that begins with = is no formula."""
    answers = ["A", "=1+1", "tab\there\nline", "ctrl\x07"]
    path = make_benchmark("mmbench", tree).submit(answers, tmp_path, "m")
    header, *cells = load_workbook(path).active.iter_rows()
    names = [cell.value for cell in header]
    assert names == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert [row[0].value for row in cells] == [0, 1, 1_000_000, 1_000_001]
    assert [row[6].value for row in cells] == ["A", "=1+1", "tab\there\nline", "ctrl"]
    assert {row[6].data_type for row in cells} == {"s"}
    assert cells[0][4].value is None


def test_mmbench_test_split(tree):
    """A file without answers is submitted, not scored."""
    rows = [{k: v for k, v in row.items() if k != "answer"} for row in trees.mmbench_rows()]
    columns = [c for c in trees.MMBENCH_COLUMNS if c != "answer"]
    trees.write_tsv(tree / "mmbench/mmbench_dev_20230712.tsv", rows, columns)
    benchmark = make_benchmark("mmbench", tree)
    assert "no answers" in benchmark.unscored()
    with pytest.raises(ConfigError, match="no answers"):
        benchmark.score(["A"] * 4)
