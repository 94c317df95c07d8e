"""The report: what it shows, read as text and looked at in headless Chromium."""

import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dattn_mcore.evaluation.__main__ import main
from dattn_mcore.evaluation.answer_files import read_answers_for
from dattn_mcore.evaluation.benchmarks import make_benchmark
from dattn_mcore.evaluation.report import choose
from dattn_mcore.evaluation.results import Result, evaluate
from dattn_mcore.evaluation.run_folder import RunFolder
from dattn_mcore.evaluation.score_file import write_scores
from tests.unit.evaluation import trees

MAGENTA = (255, 0, 255)
FIRST_RUN = (0x25, 0x63, 0xEB)  # the bar colours
SECOND_RUN = (0xD9, 0x77, 0x06)
NASTY = '<script>alert("x")</script> & <b>bold</b>'


def make_run(tree, out, model, answers):
    """A run's folder from given answers, as `run` leaves it, with one benchmark that failed."""
    folder = RunFolder(out)
    results = []
    for name, texts in answers.items():
        benchmark = make_benchmark(name, tree)
        records = [
            {"question_id": row.question_id, "prompt": row.prompt, "text": text}
            for row, text in zip(benchmark.rows, texts, strict=True)
        ]
        path = trees.lines(folder.answers / f"{name}.jsonl", records)
        joined = read_answers_for(benchmark, path)
        result = evaluate(benchmark, joined, folder, model, None)
        result.more |= {"prompt": f"[INST] {benchmark.rows[0].text}", "max_new_tokens": 9}
        results.append(result)
    results.append(Result("mmstar", "MMStar", error="the images <are> not there"))
    about = {
        "model_id": model,
        "data": str(tree),
        "template": "{{ messages }}",
        "decoding": {"dtype": "float32", "device": "cpu", "batch_size": 8, "processes": 2},
        "options": {"as_original": False},
        "versions": {"dattn_mcore": "1", "transformers": "5"},
        "date": "2026-01-01T00:00:00Z",
    }
    write_scores(folder.scores, about, results)
    return out


@pytest.fixture
def runs(tree, tmp_path):
    """Two runs over a tree whose GQA images are magenta."""
    for number in range(2):
        buffer = io.BytesIO()
        Image.new("RGB", (300, 200), MAGENTA).save(buffer, "JPEG")
        (tree / f"gqa/data/images/n{number}.jpg").write_bytes(buffer.getvalue())
    first = {
        "scienceqa": ["A", "B", "B"],
        "mme": ["Yes", "No"] * 3 + ["No", "Yes"],
        "gqa": [NASTY, "yes"],
        "vqav2": [""] * 9,
    }
    second = {**first, "scienceqa": ["B", "B", "A"], "gqa": ["ball", "no"]}
    del second["vqav2"]
    return (
        make_run(tree, tmp_path / "run-a", "model-a", first),
        make_run(tree, tmp_path / "run-b", "model-b", second),
    )


class Page(HTMLParser):
    """The text of a page, and every address in it."""

    def __init__(self, path) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "action", "srcset")]

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def test_one_run(runs, capsys):
    assert main(["report", str(runs[0])]) == 0
    assert str(runs[0] / "report.html") in capsys.readouterr().out
    page = Page(runs[0] / "report.html")
    assert "ScienceQA accuracy 66.67% 44.44% 3" in page.text  # metric, score, guessing, rows
    assert "accuracy: too few questions to tell it from guessing (2 of 3 right" in page.text
    assert "all 9 answers are empty; submission written" in page.text
    assert "MME perception 300.00 150.00 8" in page.text
    assert "the images <are> not there" in page.text and "failed" in page.text
    assert "VQAv2 submission" in page.text and "(empty answer)" in page.text
    assert "with image (IMG) 2 50.0" in page.text
    assert "What is red? Answer the question using a single word" in page.text
    assert NASTY in page.text  # as text:
    assert "script" not in page.tags and "b" not in page.tags
    assert "truth: ball" in page.text
    # One file: every image is inside, every link leads into the page.
    assert page.addresses
    assert all(a.startswith(("#", "data:image/jpeg;base64,")) for a in page.addresses)
    assert not re.search(r"https?://|@import|url\(", (runs[0] / "report.html").read_text())


def test_two_runs(runs, tmp_path):
    out = tmp_path / "both.html"
    assert main(["report", str(runs[0]), str(runs[1]), f"--out={out}"]) == 0
    page = Page(out)
    assert "model-a against model-b" in page.text
    assert "ScienceQA accuracy 66.67% 66.67% +0.00 44.44% 3" in page.text
    assert "VQAv2 submission submission not run" in page.text
    assert "with image (IMG) 2 50.0 / 50.0" in page.text
    assert page.text.count("Where the runs differ most") == 2  # ScienceQA and GQA
    shutil.rmtree(runs[1] / "details")
    assert main(["report", str(runs[0]), str(runs[1]), f"--out={out}"]) == 0


def test_which_rows_are_shown():
    """The worst come first, right ones never; the choice is the same every time."""
    credits = [1.0, 0.0, 0.5, None, 1.0, 0.2, 0.0]
    rows = [{"credit": credit} for credit in credits]
    chosen = choose([rows])
    assert sorted(chosen["Worst"][:2]) == [1, 6] and chosen["Worst"][2:] == [5, 2]
    assert len(set(chosen["Random"])) == 6 and choose([rows]) == chosen
    other = [{"credit": credit} for credit in (1.0, 1.0, 0.0, 1.0, 1.0, 0.2, None)]
    assert choose([rows, other])["Where the runs differ most"] == [1, 2]
    assert set(choose([[{"credit": None}] * 2])) == {"Random"}


def test_without_images_and_without_a_run(runs, tree, tmp_path, capsys):
    shutil.rmtree(tree)
    assert main(["report", str(runs[0])]) == 0
    assert "truth: ball" in Page(runs[0] / "report.html").text
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no scores.json" in capsys.readouterr().err
    (tmp_path / "scores.json").write_text("[]")
    assert main(["report", str(tmp_path)]) == 2
    assert "should be the score file of a run, must be a JSON object" in capsys.readouterr().err
    assert main(["report", *map(str, [*runs, runs[0]])]) == 2
    assert "one run or two, 3 are given" in capsys.readouterr().err


def chromium(path, *options):
    """Opens a page headless and without network; returns the process."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium to open the report with (Debian package chromium)")
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    common += [f"--user-data-dir={path.parent / 'profile'}", "--hide-scrollbars"]
    common += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr"]
    return subprocess.run(
        [browser, *common, *options, path.as_uri()],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )


def share(pixels, colour, tolerance=12):
    """Share of pixels near a colour; JPEG and scaling move it a little."""
    return (np.abs(pixels.astype(int) - colour).max(axis=-1) <= tolerance).mean()


def test_in_a_browser(runs, tmp_path):
    """Chromium draws table, bars of both runs and decoded images, and logs no error."""
    out = tmp_path / "both.html"
    assert main(["report", *map(str, runs), f"--out={out}"]) == 0
    picture = tmp_path / "shot.png"
    seen = chromium(out, f"--screenshot={picture}", "--window-size=1240,5200")
    assert "CONSOLE" not in seen.stderr
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    # Magenta is in the decoded images alone, two of 300 x 200 and more of the same; the bars of
    # full tracks are some 600 x 10 pixels each. Half of one of each must be there.
    assert share(pixels, MAGENTA) * pixels.shape[0] * pixels.shape[1] > 30_000
    for colour in (FIRST_RUN, SECOND_RUN):
        assert share(pixels, colour, 2) * pixels.shape[0] * pixels.shape[1] > 3_000
