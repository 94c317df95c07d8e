"""Every scorer against hand-counted answers, and the traps of the original formats."""

import json
import shutil

import pytest

from dattn_mcore.errors import ConfigError, DataError
from dattn_mcore.evaluation.answer_files import read_answers_for
from dattn_mcore.evaluation.benchmarks import ALL, Options, make_benchmark
from dattn_mcore.evaluation.benchmarks.base import check_pictures
from dattn_mcore.evaluation.check import check
from dattn_mcore.evaluation.text import leading_letter, normalise_answer, says_no, yes_or_no
from tests.unit.evaluation import trees


def score(tree, name, answers, **options):
    return make_benchmark(name, tree, Options(**options)).score(answers)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("A", ""),
        ("a/b", "b"),
        ("none", "0"),
        ("3. 5", "3 5"),
        ("3.5", "3.5"),
        ("The U.S.A.", "usa"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldntve", "couldntve"),
        ("1,000", "1000"),
        ("what?", "what"),
        ("mother's", "mother 's"),
        ("well-known", "well known"),
        ("well -known", "well known"),
        ("line\nbreak\ttab", "line break tab"),
        ("", ""),
        ("x. " * 34, "x " * 32 + "x. x."),  # a flag was passed as a count: 32 full stops go
    ],
)
def test_normaliser_quirks(answer, normal):
    """As LLaVA's m4c_evaluator gives them when run."""
    assert normalise_answer(answer) == normal


@pytest.mark.parametrize(
    ("text", "no", "four"),
    [
        ("No", True, "no"),
        ("no.", True, "no"),
        ("Yes, there is not one", True, "yes"),
        ("Yes. There is no dog", False, "yes"),
        ("No, there is", True, "no"),
        ("None", False, "no"),
        ("nothing", False, "no"),
        ("NO", False, "no"),
        ("I see no dog", True, "other"),
        ("", False, "other"),
        ("yes\tno\nyes", False, "yes"),
    ],
)
def test_yes_and_no(text, no, four):
    """POPE looks for words in the first sentence, MME in the first four letters."""
    assert says_no(text) is no
    assert yes_or_no(text) == four


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(c) the cat", "C"),
        ("b: dog", "B"),
        ("A dog", None),
        ("a dog", None),
        ("Apple", None),
        ("", None),
        ("A. dog", "A"),
        ("G", None),
    ],
)
def test_leading_letter(text, letter):
    assert leading_letter(text) == letter


def test_scienceqa(tree):
    """Only the forms that the original takes, and no letter beyond the choices."""
    right = ["A", "B", "A"]
    assert score(tree, "scienceqa", right).value == 100
    full = score(tree, "scienceqa", ["A. left", "The answer is B.", "A"])
    assert full.value == 100 and full.figures["IMG accuracy"] == 100
    none = score(tree, "scienceqa", ["A.", "(B)", "E"])  # "A." alone is no form of the original
    assert none.value == 0
    assert "2 answers name no choice" in none.notes[0]
    lenient = score(tree, "scienceqa", ["A.", "(B)", "E"], lenient_letters=True)
    assert lenient.value == pytest.approx(200 / 3)
    twice = score(tree, "scienceqa", ["The answer is A. The answer is A.", "", "A"])
    assert [o.credit for o in twice.outcomes] == [0, 0, 1]
    assert twice.figures["IMG accuracy"] == 50  # rows 0 and 2 have an image
    assert twice.categories["text only"].count == 1
    missing = score(tree, "scienceqa", [None, "B", None])
    assert missing.value == pytest.approx(100 / 3)
    assert any("2 of 3 rows have no answer" in note for note in missing.notes)


def test_mme(tree):
    """Accuracy and pairs; endings with two spaces; the two files' places."""
    benchmark = make_benchmark("mme", tree)
    truth = [answer for _, answer in benchmark.truths()]
    assert truth == ["yes", "no"] * 4
    assert benchmark.score(truth).categories["existence"].value == 200
    result = benchmark.score(["Yes", "yes", "Yes", "No\t", "Yes", "No", None, "maybe"])
    assert result.categories["existence"].value == 75 + 50
    assert result.categories["artwork"].value == 50 + 50
    assert result.value == 225 and result.figures["cognition"] == 0
    assert "12 of 14 tasks" in " ".join(result.notes)


def test_mme_answers_with_tabs_and_newlines(tree, tmp_path):
    """They would break the tool's file: cells stay four, lines stay eight."""
    answers = ["Yes\tindeed", "No\nnever", "", "No", "Yes", "No", "Yes", "No"]
    target = make_benchmark("mme", tree).submit(answers, tmp_path, "m")
    rows = [
        line.split("\t") for f in sorted(target.iterdir()) for line in f.read_text().splitlines()
    ]
    assert len(rows) == 8 and all(len(row) == 4 for row in rows)
    assert {"Yes indeed", "No never", ""} <= {row[3] for row in rows}
    assert rows[4][1:3] == ["Is there thing 0 in it? Please answer yes or no.", "Yes"]
    assert rows[5][1].endswith("it?  Please answer yes or no.")  # as in the ground truth


def test_mme_broken_pairs(tree):
    path = tree / "MME/llava_mme.jsonl"
    trees.lines(path, read(path)[:-1])
    with pytest.raises(DataError, match="has 1 questions; every image has two"):
        _ = make_benchmark("mme", tree).rows
    path.write_text(path.read_text() * 2)
    with pytest.raises(DataError, match="every image has two"):
        _ = make_benchmark("mme", tree).rows


def test_mme_same_question_twice(tree):
    path = tree / "MME/llava_mme.jsonl"
    records = read(path)
    records[1]["text"] = records[0]["text"].replace(" ", "  ", 1)
    trees.lines(path, records)
    with pytest.raises(DataError, match="has the question 'Is there thing 0 in it.' twice"):
        _ = make_benchmark("mme", tree).rows


def test_mme_scores_what_it_submits(tree, tmp_path):
    """The tool reads the first four letters of its file, where outer and line breaks are gone."""
    benchmark = make_benchmark("mme", tree)
    answers = [" \n Yes", "\t\n  No", "   yes", "\n\n\n\nno", "Yes", "No", "Yes", "No"]
    assert [o.parsed for o in benchmark.score(answers).outcomes] == ["yes", "no"] * 4
    target = benchmark.submit(answers, tmp_path, "m")
    files = [f.read_text().splitlines() for f in sorted(target.iterdir())]
    submitted = [line.split("\t")[3] for file in files for line in file]
    assert sorted(yes_or_no(text) for text in submitted) == ["no"] * 4 + ["yes"] * 4


def test_gqa(tree, tmp_path):
    result = score(tree, "gqa", ["Ball.", "Yes"])
    assert (result.value, result.figures) == (100, {"open": 100, "binary": 100})
    half = score(tree, "gqa", ["the ball", "yes"])
    assert half.value == 50 and half.categories["query"].value == 0
    path = make_benchmark("gqa", tree).submit(["Ball.", "Yes"], tmp_path, "m")
    assert json.loads(path.read_text()) == [
        {"questionId": "200", "prediction": "ball"},
        {"questionId": "201", "prediction": "yes"},
    ]


def test_textvqa(tree):
    """Ten humans: 4 x stop, 2 x other, 4 x none (which is 0)."""
    # 4 equal: (4 x min(1, 3/3) + 6 x min(1, 4/3)) / 10; 2 equal: (2 x 1/3 + 8 x 2/3) / 10
    result = score(tree, "textvqa", ["STOP.", "other"])
    assert [o.credit for o in result.outcomes] == [1, pytest.approx(0.6)]
    assert score(tree, "textvqa", ["0", "Zero"]).value == 100
    assert result.notes == ["with reference OCR tokens in the prompt"]
    without = make_benchmark("textvqa", tree, Options(textvqa_ocr=False))
    assert all("OCR" not in row.prompt for row in without.rows)
    assert without.score([None, ""]).notes[0].startswith("without")
    assert without.score([None, ""]).value == 0


def test_textvqa_repeated_ids(tree, tmp_path):
    """Both questions have the id of their image; prompts with and without OCR tokens join."""
    benchmark = make_benchmark("textvqa", tree)
    assert len({row.question_id for row in benchmark.rows}) == 1
    prompts = [
        f"What COLOR is it?{trees.SHORT_ANSWER}",
        f"Reference OCR token: a\nWhat does it say?{trees.SHORT_ANSWER}",
    ]
    answers = [
        {"question_id": "abc", "prompt": prompt, "text": text}
        for prompt, text in zip(prompts, ("red", "stop"), strict=True)
    ]
    path = trees.lines(tmp_path / "a.jsonl", answers)
    joined = read_answers_for(benchmark, path)
    assert joined == ["stop", "red"]
    assert benchmark.score(joined).value == 100


@pytest.mark.parametrize(
    ("tokens", "note"),
    [
        (("", ""), "without reference OCR tokens in the prompt"),
        (("\nReference OCR token: a", "\nReference OCR token: b"), "with reference OCR tokens in"),
        (("\nReference OCR token: a", ""), "mixed: 1 of 2 prompts have reference OCR tokens"),
    ],
)
@pytest.mark.parametrize("asks_with_tokens", [True, False])
def test_textvqa_says_what_the_answers_were_asked(tree, tmp_path, tokens, note, asks_with_tokens):
    """The answers' prompts count, not the question file or the flag of this run."""
    questions = ("What does it say?", "What color is it?")
    records = [
        {"question_id": "abc", "prompt": question + token + trees.SHORT_ANSWER, "text": "x"}
        for question, token in zip(questions, tokens, strict=True)
    ]
    benchmark = make_benchmark("textvqa", tree, Options(textvqa_ocr=asks_with_tokens))
    result = benchmark.score(read_answers_for(benchmark, trees.lines(tmp_path / "a", records)))
    assert result.notes[0].startswith(note)
    assert result.figures["rows with OCR tokens"] == sum(map(bool, tokens))


def test_seed(tree):
    """Ids are numbers in one file and text in the other; "A." only behind the flag."""
    result = score(tree, "seed", ["A", "B."])
    assert (result.value, result.figures) == (50, {"image": 100, "video": 0})
    assert result.categories["Action Recognition"].value == 0
    assert any("1 answers are no single letter" in note for note in result.notes)
    lenient = score(tree, "seed", ["A", "B."], lenient_letters=True)
    assert lenient.value == 100


def test_the_note_on_letters_names_the_option(tree):
    """An answer like "A. text" is wrong by the original's rule, and often right by its sense."""
    hint = "; --lenient-letters reads one in {} of them"
    seed = score(tree, "seed", ["A. cat", "It is B"]).notes
    assert f"2 answers are no single letter and count as wrong{hint.format(1)}" in seed
    assert (
        "1 answers are no single letter and count as wrong"
        in score(tree, "seed", ["A", "It is B"]).notes
    )
    assert (
        f"1 answers are no single letter and count as wrong{hint.format(1)}"
        in score(tree, "seed", ["a", "B"]).notes
    )
    lenient = score(tree, "seed", ["A. cat", "It is B"], lenient_letters=True)
    assert "1 answers are no single letter and count as wrong" in lenient.notes
    science = score(tree, "scienceqa", ["A.", "(B)", "none"]).notes
    assert f"3 answers name no choice in a form that counts{hint.format(2)}" in science
    lenient = score(tree, "scienceqa", ["A.", "(B)", "none"], lenient_letters=True)
    assert "1 answers name no choice in a form that counts" in lenient.notes


def test_seed_without_videos(tree, tmp_path):
    """Answers that exist are scored without the frames; to answer, an image-only tree needs the flag."""
    shutil.rmtree(tree / "seed_bench/SEED-Bench-video-image")
    whole = make_benchmark("seed", tree)
    records = [{"question_id": r.question_id, "prompt": r.prompt, "text": "A"} for r in whole.rows]
    path = trees.lines(tmp_path / "a.jsonl", records)
    assert whole.score(read_answers_for(whole, path)).figures == {"image": 100, "video": 0}
    with pytest.raises(DataError, match="1 of 2 images are not there.*--seed-images-only"):
        check_pictures(whole, [0, 1])
    assert any("--seed-images-only" in problem for problem in check(whole).problems)
    images = make_benchmark("seed", tree, Options(seed_images_only=True))
    check_pictures(images, [0])
    assert not check(images).problems
    assert read_answers_for(images, path) == ["A"]  # the answer to the video row is passed over
    result = images.score(["A"])
    assert result.value == 100 and list(result.figures) == ["image"]
    assert any("no rows about videos" in note for note in result.notes)
    with pytest.raises(DataError, match="they belong to another benchmark"):
        read_answers_for(images, trees.lines(path, [{**records[1], "question_id": 5}]))


def test_vqav2(tree, tmp_path):
    """Every id of test2015, in its order; empty where nothing was asked or answered."""
    path = make_benchmark("vqav2", tree).submit(["A dog.", *[None] * 8], tmp_path, "m")
    assert json.loads(path.read_text()) == [
        {"question_id": 7, "answer": ""},
        {"question_id": 262144000, "answer": "dog"},
        *({"question_id": 262144000 + number, "answer": ""} for number in range(1, 9)),
    ]


def test_vizwiz_needs_every_answer(tree, tmp_path):
    benchmark = make_benchmark("vizwiz", tree)
    with pytest.raises(DataError, match=r"1 of 2 rows have no answer \(first: 1\)"):
        benchmark.submit(["x", None], tmp_path, "m")
    with pytest.raises(ConfigError, match="scored by its server"):
        benchmark.score(["x", "y"])


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("A", 1),
        ("a", 1),
        ("A: x", 1),
        ("(A)", 1),
        ("Option A", 1),
        ("The answer is A.", 1),
        ("a dog", 1),  # the article, as in the original
        ("It is A", 0),
        ("", 0),
        ("B", 0),
    ],
)
def test_mmstar(tree, text, right):
    result = score(tree, "mmstar", [text, "B"])
    assert result.outcomes[0].credit == right
    assert result.value == 50 + 50 * right
    assert any("article" in note for note in result.notes) == (text == "a dog")


@pytest.mark.parametrize("text", ["an apple", "all", "And", "(apple", "Option abc"])
def test_mmstar_words(tree, text):
    """The original reads their first letter; so does this, and says it."""
    result = score(tree, "mmstar", [text, "dog"])
    assert [o.credit for o in result.outcomes] == [1, 0]
    assert "2 answers begin with a word" in result.notes[0]
    assert "1 of them count as right" in result.notes[0]
    assert not score(tree, "mmstar", ["A.", "(B) x"]).notes


def test_mmstar_from_tsv(tree):
    (tree / "mmstar/mmstar.parquet").unlink()
    trees.mmstar_tsv(tree / "mmstar")
    benchmark = make_benchmark("mmstar", tree)
    assert benchmark.rows[0].prompt.endswith(f"\nA. x\nB. y{trees.LETTER_ANSWER}")
    assert benchmark.rows[0].pictures[0].open("row").size == (30, 20)
    assert benchmark.score(["A", "A"]).value == 50


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_answers_join_by_id_in_any_order(tree, tmp_path, kind):
    """Our answers and LLaVA's, shuffled; strangers and repetitions are refused."""
    benchmark = kind(tree)
    records = [
        {"question_id": row.question_id, "prompt": row.prompt, "text": f"answer {number}\t\n"}
        for number, row in enumerate(benchmark.rows)
    ]
    expected = [record["text"] for record in records]
    path = trees.lines(tmp_path / "a.jsonl", records[::-1])
    assert read_answers_for(benchmark, path) == expected
    trees.lines(path, records[1:])
    assert read_answers_for(benchmark, path) == [None, *expected[1:]]
    trees.lines(path, [*records, records[0]])
    with pytest.raises(DataError, match="is answered twice"):
        read_answers_for(benchmark, path)
    trees.lines(path, [*records, {"question_id": "x9", "prompt": "?", "text": ""}])
    with pytest.raises(DataError, match="belong to another benchmark or split"):
        read_answers_for(benchmark, path)
