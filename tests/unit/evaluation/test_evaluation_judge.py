"""The judge, against a real HTTP server: cached, retried, resumable; failures never scored."""

import errno
import json
import os
import socket

import pytest

from dattn_mcore.errors import ConfigError, DataError
from dattn_mcore.evaluation.__main__ import main
from dattn_mcore.evaluation.benchmarks import Options, make_benchmark
from dattn_mcore.evaluation.benchmarks.llava_bench import RULE
from dattn_mcore.evaluation.benchmarks.mmvet import PROMPT
from dattn_mcore.evaluation.judge import Judge, JudgeSettings
from dattn_mcore.evaluation.judge_endpoint import SILENT_ROWS
from tests.unit.evaluation import trees
from tests.unit.evaluation.judge_server import JudgeServer, Talker

ANSWERS = ["zero", "one\n", ""]


def judge(server, **changes):
    settings = {"attempts": 3, "wait_seconds": 0.01, "timeout_seconds": 5.0, **changes}
    return Judge(JudgeSettings(server.url, "judge-1", **settings))


def number_of(body) -> int:
    """Which LLaVA-Bench question a request is about."""
    return int(body["messages"][-1]["content"].split("What is ")[1][0])


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_llava_bench(tree, tmp_path):
    """What is asked, what is kept, the score; asked again, nothing goes over the wire."""
    benchmark = make_benchmark("llava-bench", tree)
    path = tmp_path / "reviews.jsonl"
    with JudgeServer(lambda asked, body: f"8 {number_of(body) + 4}\nBecause.") as server:
        score = judge(server, key="secret")(benchmark, ANSWERS, path)
        assert score.value == pytest.approx(100 * (4 + 5 + 6) / 24)
        assert score.categories["llava_bench_detail"].value == pytest.approx(100 * 5 / 8)
        assert len(server.requests) == 3
        assert server.headers[0]["Authorization"] == "Bearer secret"
        asked = next(r for r in server.requests if number_of(r) == 1)
        assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("judge-1", 0.2, 1024)
        assert asked["messages"][1]["content"] == (
            "[Context]\nA photo of 1.\n\n[Question]\nWhat is 1?\n\n"
            "[Assistant 1]\nIt is 1.\n\n[End of Assistant 1]\n\n"
            f"[Assistant 2]\none\n\n\n[End of Assistant 2]\n\n[System]\n{RULE}\n\n"
        )
        again = judge(server)(benchmark, ANSWERS, path)
        assert again.value == score.value and len(server.requests) == 3
        judge(server)(benchmark, ["zero", "one\n", "new"], path)
        assert len(server.requests) == 4  # the changed answer alone
    assert [record["tuple"] for record in read(path)] == [[8, 4], [8, 5], [8, 6]]
    assert read(path)[0]["content"] == "8 4\nBecause."
    arguments = ["score", "--benchmark=llava-bench", f"--reviews={path}"]
    assert main([*arguments, f"--json={tmp_path / 's.json'}"]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["llava-bench"]["value"] == score.value


def test_failures_are_retried_then_counted_and_never_scored(tree, tmp_path):
    """Question 0 succeeds at once, 1 at the third attempt, 2 never."""

    def reply(asked, body):
        if number_of(body) == 0:
            return "5 5"
        if number_of(body) == 1:
            return (503, "I cannot say", "10 5")[asked - 1]
        return ("no scores here", b"{not json", 429)[asked - 1]

    benchmark = make_benchmark("llava-bench", tree)
    path = tmp_path / "reviews.jsonl"
    with JudgeServer(reply) as server:
        score = judge(server)(benchmark, ANSWERS, path)
        assert len(server.requests) == 1 + 3 + 3
    assert score.value == pytest.approx(100 * (5 + 5) / (5 + 10))
    assert score.figures["failed judgements"] == 1 and score.figures["judged"] == 2
    assert "1 of 3 judgements failed; left out of the score" in score.notes
    assert [o.credit for o in score.outcomes] == [0.5, 0.5, None]
    assert read(path)[2]["tuple"] == [-1, -1]
    # The original averages them in.
    original = make_benchmark("llava-bench", tree, Options(as_original=True))
    averaged = original.score_reviews(read(path))
    assert averaged.value == pytest.approx(100 * (5 + 5 - 1) / (5 + 10 - 1))
    assert "averaged in" in averaged.notes[0]
    # The next run asks for the failed one alone.
    with JudgeServer(lambda asked, body: "9 9") as server:
        full = judge(server)(benchmark, ANSWERS, path)
        assert [number_of(body) for body in server.requests] == [2]
    assert full.figures["failed judgements"] == 0


def test_a_stopped_run_goes_on(tree, tmp_path):
    """A line cut by a kill is asked again, the others are not."""
    benchmark = make_benchmark("llava-bench", tree)
    path = tmp_path / "reviews.jsonl"
    kept = tmp_path / "reviews.judgements.jsonl"
    with JudgeServer(lambda asked, body: "6 3") as server:
        first = judge(server)(benchmark, ANSWERS, path)
        kept.write_bytes(kept.read_bytes()[:-9])
        path.unlink()
        assert judge(server)(benchmark, ANSWERS, path).value == first.value == 50
        assert len(server.requests) == 4
    assert kept.read_bytes().count(b"\n") == 3


def test_mm_vet(tree, tmp_path):
    """One number; a reply without one is asked again with MM-Vet's reminder."""

    def reply(asked, body):
        content = body["messages"][-1]["content"]
        if "What is x in 0?" in content:
            return "0.5"
        return "1.0" if "digit" in content else "correct"

    benchmark = make_benchmark("mm-vet", tree)
    path = tmp_path / "reviews.jsonl"
    with JudgeServer(reply) as server:
        score = judge(server)(benchmark, ["a", "b"], path)
    assert score.value == 75
    assert {k: (b.value, b.count) for k, b in score.categories.items()} == {
        "ocr": (75, 2),
        "math": (100, 1),
    }
    contents = [body["messages"][-1]["content"] for body in server.requests]
    assert f"{PROMPT}\nWhat is x in 0? | 0 <OR> zero | a | " in contents
    assert [b["temperature"] for b in server.requests if "in 1?" in str(b)] == [0.0, 0.5]
    assert all(body["max_tokens"] == 3 for body in server.requests)
    failed = [{"question_id": 0, "score": None}, {"question_id": 1, "score": 1.0}]
    assert benchmark.score_reviews(failed).value == 100
    assert (
        make_benchmark("mm-vet", tree, Options(as_original=True)).score_reviews(failed).value == 50
    )


def test_the_judge_by_command(tree, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", "k")
    rows = make_benchmark("llava-bench", tree).rows
    records = [{"question_id": row.question_id, "text": "it"} for row in rows]
    answers = trees.lines(tmp_path / "a.jsonl", records)
    with JudgeServer(lambda asked, body: "8, 4") as server:
        arguments = ["score", "--benchmark=llava-bench", f"--data={tree}", f"--answers={answers}"]
        arguments += [f"--judge-url={server.url}/", "--judge-model=m", "--judge-key-env=MY_KEY"]
        assert main(arguments) == 0
        assert server.headers[0]["Authorization"] == "Bearer k"
    assert "50.00%" in capsys.readouterr().out
    assert (tmp_path / "a.reviews.jsonl").is_file()


@pytest.mark.parametrize("status", [401, 404])
def test_a_refusal_ends_at_once(tree, tmp_path, status):
    """A wrong key or model is reported once, not asked five times a row."""
    benchmark = make_benchmark("llava-bench", tree)
    with JudgeServer(lambda asked, body: status) as server:
        with pytest.raises(ConfigError, match=f"refuses .{status}.*check the URL"):
            judge(server, parallel=1)(benchmark, ANSWERS, tmp_path / "r.jsonl")
        assert len(server.requests) <= 2


def test_a_row_that_is_refused_is_a_failed_judgement(tree, tmp_path):
    """Such as one that is too long for the judge: not asked again, the others are judged."""
    benchmark = make_benchmark("llava-bench", tree)
    with JudgeServer(lambda asked, body: 400 if number_of(body) == 1 else "8 8") as server:
        score = judge(server)(benchmark, ANSWERS, tmp_path / "r.jsonl")
        assert len(server.requests) == 3
    assert score.value == 100 and score.figures["failed judgements"] == 1


def test_bad_judges(tree, tmp_path, capsys):
    benchmark = make_benchmark("llava-bench", tree)
    for url in ("localhost:8000", "http://", "http://a b/v1", "http://a:80x0/v1", "http://a\n/v1"):
        with pytest.raises(ConfigError, match="must be the http"):
            Judge(JudgeSettings(url, "m"))
    with JudgeServer(lambda asked, body: 500) as server:
        asks = judge(server, attempts=1)
        with pytest.raises(DataError, match="none of 3 judgements succeeded"):
            asks(benchmark, ANSWERS, tmp_path / "r.jsonl")
        with pytest.raises(DataError, match="1 of 3 rows have no answer"):
            asks(benchmark, [None, "b", "c"], tmp_path / "r.jsonl")
    with pytest.raises(DataError, match="none of 3 judgements succeeded"):  # nobody listens
        judge(server, attempts=2)(benchmark, ANSWERS, tmp_path / "r.jsonl")
    (tree / "llava-bench-in-the-wild/context.jsonl").unlink()
    with pytest.raises(DataError, match="context.jsonl cannot be read"):
        judge(server)(benchmark, ANSWERS, tmp_path / "r.jsonl")
    answers = trees.lines(tmp_path / "a.jsonl", [])
    arguments = ["score", "--benchmark=llava-bench", f"--data={tree}", f"--answers={answers}"]
    assert main(arguments) == 2
    assert "is judged; give --judge-url" in capsys.readouterr().err
    assert main([*arguments, "--judge-url=http://x"]) == 2
    assert "go together" in capsys.readouterr().err
    assert main(["score", "--benchmark=gqa", f"--reviews={answers}"]) == 2
    assert "GQA is not judged" in capsys.readouterr().err


def test_replies_that_are_no_http_are_failed_judgements(tree, tmp_path, caplog):
    """A reply that is cut in its body, and a port where something else listens."""
    benchmark = make_benchmark("llava-bench", tree)
    cut = b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"
    for said, problem in ((cut, "the reply is cut"), (b"SSH-2.0-OpenSSH\r\n", "no answer of HTTP")):
        with Talker(said) as talker, pytest.raises(DataError, match="none of 3 judgements"):
            judge(talker, attempts=2)(benchmark, ANSWERS, tmp_path / "r.jsonl")
        assert problem in caplog.text
        caplog.clear()


def test_an_endpoint_that_is_down_is_not_asked_about_every_row(tree, tmp_path, caplog):
    """With no answer at all to the first rows, the rest is left; what is kept is scored."""
    root, path = tree / "llava-bench-in-the-wild", tmp_path / "r.jsonl"
    for name in ("questions.jsonl", "answers_gpt4.jsonl"):
        records = read(root / name)
        changed = [{**r, "question_id": n} for n, r in enumerate(records * 30)]
        trees.lines(root / name, changed)
    benchmark = make_benchmark("llava-bench", tree)
    answers = [str(n) for n in range(90)]
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    down = Judge(JudgeSettings(url, "judge-1", attempts=3, wait_seconds=0.2))
    with pytest.raises(DataError, match=r"none of 90 .* does not answer .no answer of HTTP"):
        down(benchmark, answers, path)
    # Each of the 8 threads is at one row when the third fails; two others failed before.
    assert SILENT_ROWS <= caplog.text.count("judgement failed") <= 8 + SILENT_ROWS - 1
    assert len(read(path)) == 90
    with JudgeServer(lambda asked, body: "8 4") as server:
        judge(server)(benchmark, answers, path)
    score = down(benchmark, [*answers[:40], *("new" for _ in range(50))], path)
    assert score.value == 50 and score.figures["failed judgements"] == 50
    assert "does not answer" in score.notes[1]


def test_a_full_disk_ends_the_judging(tree, tmp_path, monkeypatch):
    """One line, not a traceback, and no reply is paid for that cannot be kept."""

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    benchmark = make_benchmark("llava-bench", tree)
    with JudgeServer(lambda asked, body: "8 4") as server:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match="judgements.jsonl cannot be written .No space"):
            judge(server, parallel=1)(benchmark, ANSWERS, tmp_path / "r.jsonl")
        assert len(server.requests) <= 2


def test_bad_commands(tree, tmp_path, capsys):
    """Each is one line."""
    rows = make_benchmark("vqav2", tree).rows
    given = [{"question_id": row.question_id, "text": "x"} for row in rows]
    data, file = f"--data={tree}", trees.lines(tmp_path / "a.jsonl", given)
    asks = ["--benchmark=mm-vet", data, "--judge-url=http://localhost:1", "--judge-model=m"]
    for arguments, message in (
        (["score", *asks], "--answers is missing"),
        (["score", *asks, "--answers=."], "--answers . cannot be read"),
        (["submit", "--benchmark=vqav2", data, f"--answers={file}", f"--out={file}"], "be written"),
        (["check", data, "--benchmarks=,"], "at least one of scienceqa"),
        (["run", data, "--model=x", "--benchmarks="], "at least one of scienceqa"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    for wait in ("-1", "nan", "inf", "x"):
        with pytest.raises(SystemExit):
            main(["score", *asks, f"--judge-wait-seconds={wait}"])
        assert "a number of seconds, 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "good"),
    [("llava-bench", {"tuple": [8, 4]}), ("mm-vet", {"score": 0.5})],
)
def test_partial_and_doubled_reviews(tree, tmp_path, capsys, name, good):
    """Half a file is scored and says so; a question that stands twice is refused."""
    benchmark = make_benchmark(name, tree)
    reviews = [{"question_id": number, **good} for number in range(benchmark.full_rows)]
    assert not benchmark.score_reviews(reviews).notes
    half = benchmark.score_reviews(reviews[:5])
    assert half.notes == [f"5 reviews; the released file has {benchmark.full_rows} questions"]
    path = trees.lines(tmp_path / "r.jsonl", [*reviews, {**reviews[3], "question_id": "3"}])
    arguments = ["score", f"--benchmark={name}", f"--data={tree}", f"--reviews={path}"]
    assert main(arguments) == 2
    assert "is about question '3', which review 4 is about already" in capsys.readouterr().err
    assert main([*arguments, f"--answers={path}"]) == 2
    assert "give one of them" in capsys.readouterr().err
