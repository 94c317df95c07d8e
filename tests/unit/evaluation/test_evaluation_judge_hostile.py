"""A judge's endpoint that means harm: the key stays here, and nothing takes for ever or ends a run."""

import itertools
import json
import time
import traceback

import pytest

from dattn_mcore.errors import ConfigError, DataError
from dattn_mcore.evaluation.__main__ import main
from dattn_mcore.evaluation.benchmarks import make_benchmark
from dattn_mcore.evaluation.judge import Judge, JudgeSettings
from dattn_mcore.evaluation.judge_endpoint import without_key
from tests.unit.evaluation import trees
from tests.unit.evaluation.judge_server import JudgeServer, Talker
from tests.unit.evaluation.test_evaluation_judge import ANSWERS, judge, number_of, read

KEY = "sk-Test-0123456789abcdefghijKLMN"
OK = b"HTTP/1.1 200 OK\r\n"


def whole(head: str, body: bytes = b"") -> bytes:
    return f"HTTP/1.1 {head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(tree, tmp_path, status):
    """To another port, which is another origin: neither key nor question go there."""
    benchmark = make_benchmark("llava-bench", tree)
    with JudgeServer(lambda asked, body: "8 8") as other:
        target = f"{other.url}/chat/completions"
        with Talker(whole(f"{status} Moved\r\nLocation: {target}?key={KEY}")) as talker:
            with pytest.raises(ConfigError, match=f"redirects .{status}. to '{target}") as caught:
                judge(talker, key=KEY, parallel=1)(benchmark, ANSWERS, tmp_path / "r.jsonl")
            assert talker.callers == 1
        assert other.requests == []
    assert KEY not in str(caught.value) and "[key]" in str(caught.value)
    assert not (tmp_path / "r.jsonl").exists()


ECHOES = {
    "refused": whole("401 No", f"Authorization: Bearer {KEY} is wrong".encode()),
    "reason": whole(f"401 {KEY}"),
    "row": whole("400 Bad", json.dumps({"error": {"message": f"got {KEY}"}}).encode()),
    "server": whole("500 Fault", f"Bearer {KEY}\n".encode()),
    "capitals": whole("500 Fault", f"AUTHORIZATION: {KEY.upper()}".encode()),
    **{f"cut at {n}": whole("500 Fault", b"x" * n + KEY.encode()) for n in (170, 190, 280, 299)},
    "no json": whole("200 OK", f"{{{KEY}".encode()),
    "no choices": whole("200 OK", json.dumps({KEY: KEY}).encode()),
    "no http": f"{KEY} {KEY}\r\n".encode(),
    "header": f"HTTP/1.1 200 OK\r\n{KEY}\r\n\r\n".encode(),
    "length": f"HTTP/1.1 200 OK\r\nContent-Length: {KEY}\r\n\r\n".encode(),
    "redirect": whole(f"307 Go\r\nLocation: http://127.0.0.1:9/{KEY}"),
    "no score": whole(
        "200 OK", json.dumps({"choices": [{"message": {"content": f"key {KEY}"}}]}).encode()
    ),
    "judgement": whole(
        "200 OK", json.dumps({"choices": [{"message": {"content": f"8 4\n{KEY}"}}]}).encode()
    ),
}


@pytest.mark.parametrize("said", ECHOES.values(), ids=ECHOES)
def test_the_key_is_in_no_output_and_no_file(tree, tmp_path, said, monkeypatch, capsys, caplog):
    """Nor a piece of it, whatever the endpoint sends back."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    out = tmp_path / "out"
    rows = make_benchmark("llava-bench", tree).rows
    records = [{"question_id": row.question_id, "text": "it"} for row in rows]
    answers = trees.lines(out / "a.jsonl", records)
    with Talker(said) as talker:
        arguments = ["score", "--benchmark=llava-bench", f"--data={tree}", f"--answers={answers}"]
        arguments += [f"--judge-url={talker.url}", "--judge-model=m", "--judge-attempts=2"]
        status = main([*arguments, "--judge-wait-seconds=0", f"--json={out / 's.json'}"])
        assert talker.callers
    shown = capsys.readouterr()
    texts = [shown.out, shown.err, caplog.text]
    texts += [path.read_text() for path in out.iterdir()]
    together = "\n".join(texts).lower()
    pieces = {KEY.lower()[i : i + 8] for i in range(len(KEY) - 7)}
    assert not [piece for piece in pieces if piece in together]
    judged = b"8 4" in said
    assert status == (0 if judged else 2)
    assert len(shown.err.splitlines()) == (0 if judged else 1)
    if judged:
        assert "8 4\n[key]" in {record["content"] for record in read(out / "a.reviews.jsonl")}


def test_what_is_hidden():
    assert without_key(f"a {KEY} b {KEY[3:14]} c", KEY) == "a [key] b [key] c"
    assert without_key(f"{KEY[:7]} is short", KEY) == f"{KEY[:7]} is short"
    assert without_key("8 4\nx", "x") == "8 4\nx"  # of a local endpoint that wants any
    assert without_key("İ" + KEY.upper(), KEY) == "İ[key]"
    assert without_key("text", "") == "text"
    assert KEY not in repr(JudgeSettings("http://x", "m", KEY))
    assert KEY not in repr(Judge(JudgeSettings("http://x", "m", KEY)).endpoint)


def test_keys_that_no_header_takes(tree, tmp_path, monkeypatch, capsys):
    """A line break inside would be an error that quotes the key; at the end it is no part of it."""
    for key in (f"{KEY}\nX: y", f"{KEY} y", f"{KEY}é"):
        with pytest.raises(ConfigError, match="has a space, a line break or") as caught:
            Judge(JudgeSettings("http://x", "m", key))
        assert KEY not in "".join(traceback.format_exception(caught.value))
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    rows = make_benchmark("llava-bench", tree).rows
    records = [{"question_id": row.question_id, "text": "it"} for row in rows]
    answers = trees.lines(tmp_path / "a.jsonl", records)
    with JudgeServer(lambda asked, body: "8 4") as server:
        arguments = ["score", "--benchmark=llava-bench", f"--data={tree}", f"--answers={answers}"]
        assert main([*arguments, f"--judge-url={server.url}", "--judge-model=m"]) == 0
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("url", ["http://me:{}@x/v1", "https://x/v1?key={}", "http://x/v1#{}"])
def test_urls_that_hold_a_secret(url):
    with pytest.raises(ConfigError, match="has a user name, a query or a fragment") as caught:
        Judge(JudgeSettings(url.format(KEY), "m"))
    assert KEY not in str(caught.value)


def test_a_proxy_that_cannot_be_used(tree, tmp_path, monkeypatch):
    """One line, without the password that its URL may hold."""
    monkeypatch.setenv("ALL_PROXY", f"ftp://me:{KEY}@127.0.0.1:9")
    with pytest.raises(ConfigError, match="that the environment names") as caught:
        judge(Talker(b""))(make_benchmark("llava-bench", tree), ANSWERS, tmp_path / "r.jsonl")
    assert KEY not in str(caught.value)


def chat(content: str) -> bytes:
    """A chat completion with this content, escapes as they are."""
    return b'{"choices": [{"message": {"content": "' + content.encode() + b'"}}]}'


REPLIES = {
    "brackets": b"[" * 1_000_000,
    "braces": b'{"a":' * 1_000_000,
    "nested beside": b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b", " + chat("8 4")[1:],
    "half a character": chat("8 4\\n\\ud800"),
    "half a character in bytes": chat("8 4\\n@").replace(b"@", b"\xed\xa0\x80"),
    "a number of 5,000 digits": b"9" * 5000,
    "not a number": b"NaN",
    "empty": b"",
    "a list": b"[]",
    "a text": b'"8 4"',
    "no message": b'{"choices": [{"message": null}]}',
    "no choice": b'{"choices": []}',
    "a number as text": b'{"choices": [{"message": {"content": 8}}]}',
}


@pytest.mark.parametrize("hostile", REPLIES.values(), ids=REPLIES)
def test_a_reply_that_cannot_be_read_is_a_failed_judgement(tree, tmp_path, hostile):
    """The other rows are judged; at a restart it is asked again, and fails again."""
    benchmark = make_benchmark("llava-bench", tree)
    path = tmp_path / "reviews.jsonl"
    for _ in range(2):
        with JudgeServer(lambda asked, body: hostile if number_of(body) == 1 else "8 4") as server:
            score = judge(server, attempts=2)(benchmark, ANSWERS, path)
            assert [number_of(body) for body in server.requests].count(1) == 2
        assert score.value == 50 and score.figures["failed judgements"] == 1
        assert "1 of 3 judgements failed; left out of the score" in score.notes
        assert read(path)[1]["tuple"] == [-1, -1]
    with JudgeServer(lambda asked, body: "4 4") as server:
        assert judge(server)(benchmark, ANSWERS, path).figures["failed judgements"] == 0
        assert [number_of(body) for body in server.requests] == [1]


@pytest.mark.parametrize("head", [b"Content-Length: 314572800\r\n\r\n", b"\r\n"])
def test_a_reply_has_a_largest_size(tree, tmp_path, head, caplog):
    """Of 300 MiB no more is taken than the bound and what was on its way."""
    sent = []

    def flood(caller):
        caller.sendall(OK + head)
        for _ in range(300):
            caller.sendall(b" " * 2**20)
            sent.append(2**20)

    benchmark = make_benchmark("llava-bench", tree)
    with Talker(flood) as talker, pytest.raises(DataError, match="none of 3 judgements"):
        judge(talker, attempts=1, parallel=1)(benchmark, ANSWERS, tmp_path / "r.jsonl")
    assert caplog.text.count("the reply has more than 4 MiB") == 3
    assert sum(sent) < 3 * 16 * 2**20


def test_a_compressed_reply_is_not_unpacked(tree, tmp_path, caplog):
    benchmark = make_benchmark("llava-bench", tree)
    said = OK + b"Content-Encoding: gzip\r\n\r\n" + b"\x1f\x8b" * 9
    with Talker(said) as talker, pytest.raises(DataError, match="none of 3 judgements"):
        judge(talker, attempts=1)(benchmark, ANSWERS, tmp_path / "r.jsonl")
    assert "the reply is compressed" in caplog.text


@pytest.mark.parametrize("start", [OK + b"\r\n", OK + b"X: ", b""], ids=["body", "header", "start"])
def test_a_request_ends_at_its_limit(tree, tmp_path, start, caplog):
    """A byte now and then is no sign of life; nor is silence."""

    def trickle(caller):
        caller.sendall(start)
        for _ in itertools.repeat(None):
            time.sleep(0.1)
            caller.sendall(b" " if start else b"H")

    benchmark = make_benchmark("llava-bench", tree)
    with Talker(trickle) as talker, pytest.raises(DataError, match="none of 3 judgements"):
        begun = time.monotonic()
        asks = judge(talker, attempts=1, timeout_seconds=0.5)
        asks(benchmark, ANSWERS, tmp_path / "r.jsonl")
    assert 0.5 <= time.monotonic() - begun < 5
    assert caplog.text.count("no whole reply within 0.5 s") == 3
