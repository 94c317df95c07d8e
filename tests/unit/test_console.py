"""What comes from data, file names or servers reaches a console or a log as one printable line."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from dattn_mcore.console import cell, complain, printable, say
from dattn_mcore.data.__main__ import main as data_main
from dattn_mcore.data.tokenizer import train_tokenizer
from dattn_mcore.errors import CheckpointError, ConfigError, DataError, FaultError
from dattn_mcore.evaluation.__main__ import main as evaluation_main
from dattn_mcore.log import log_to_stderr, log_to_stdout

ROOT = Path(__file__).resolve().parents[2]
EVIL = "a\nerror: all is lost\x1b[2J\x1b]0;title\x07\r\u2028\u202e.jpg"
SHOWN = r"a\nerror: all is lost\x1b[2J\x1b]0;title\x07\r\u2028\u202e.jpg"


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """Handlers that a test adds go with it."""
    own, root = logging.getLogger("dattn_mcore"), logging.getLogger()
    kept = (own.handlers[:], own.propagate, own.level, root.handlers[:], root.level)
    yield
    own.handlers[:], own.propagate, own.level, root.handlers[:], root.level = kept


def harmless(said: str) -> bool:
    """Whether nothing in it controls a terminal, and no line is forged."""
    lines = said.split("\n")
    return all(line.isprintable() and not line.startswith("error: all") for line in lines)


def test_printable() -> None:
    assert printable(EVIL) == SHOWN == printable(SHOWN)
    assert printable("漢字 é 🙂 [red] \\n") == "漢字 é 🙂 [red] \\n"
    assert printable("half \ud800 of\x00 a\x9b") == "half \\ud800 of\\x00 a\\x9b"
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert printable(Path("a\tb")) == "a\\tb"


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError, FaultError])
def test_an_error_is_one_printable_line(kind: type[Exception]) -> None:
    assert str(kind(f"image '{EVIL}' is gone")) == f"image '{SHOWN}' is gone"


def test_lines_and_cells(capsys: pytest.CaptureFixture[str]) -> None:
    say(EVIL)
    complain(EVIL)
    said = capsys.readouterr()
    assert said.out == said.err == SHOWN + "\n"
    Console(width=200).print(cell(f"[bold]{EVIL}"))
    assert capsys.readouterr().out == f"[bold]{SHOWN}\n"


def test_log_lines(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stdout()
    logging.getLogger("dattn_mcore.data").warning("%s of %d", EVIL, 3)
    assert capsys.readouterr().out == f"{SHOWN} of 3\n"
    logging.getLogger("dattn_mcore").handlers.clear()
    logging.getLogger("dattn_mcore").propagate = True
    logging.getLogger().handlers.clear()  # pytest's
    log_to_stderr()
    logging.getLogger("dattn_mcore.evaluation").warning(EVIL)
    logging.getLogger("tools.checkpoint_convert").warning(EVIL)
    logging.getLogger("some.package").warning("two\nlines\x1b")
    assert capsys.readouterr().err == f"{SHOWN}\n{SHOWN}\ntwo\nlines\\x1b\n"


def test_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy_model = tmp_path / "tokenizer.model"
    train_tokenizer(["Which digit is in the cell?", "user model 0 1 2 3 4 5 6 7 8 9"], toy_model)
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "7"}]
    Image.new("RGB", (56, 56)).save(tmp_path / "cut.png")
    raw = (tmp_path / "cut.png").read_bytes()
    names = [EVIL.replace("/", "_"), "x" + EVIL]
    (tmp_path / names[1]).write_bytes(raw[:60])
    records = [{"id": name, "image": name, "conversations": turns} for name in names]
    records += [{"id": EVIL, EVIL: 1, "conversations": turns}]
    records += [{"id": "k", "model": "m", "conversations": [turns[1] | {"value": "hi"}, *turns]}]
    records[-1]["conversations"][1] = {"from": "human", "value": "q"}
    records[-1]["conversations"][1][EVIL] = 1
    (tmp_path / f"{EVIL}.json").write_text(json.dumps(records))
    settings = [
        f'data.annotations={json.dumps(str(tmp_path / EVIL))[:-1]}.json"',
        "data.prepare=none",
        f"data.image_folder={tmp_path}",
        f"data.tokenizer={toy_model}",
        "data.template=mistral",
        f"data.metadata_keys={json.dumps([EVIL])}",
        "model.vision.image_size=56",
        "model.vision.patch_size=14",
    ]
    assert data_main(["check", "--workers", "0", "--decode", *settings]) == 1
    assert data_main(["index", "--workers", "0", *settings]) == 2
    said = capsys.readouterr()
    assert SHOWN in said.out and SHOWN in said.err
    assert harmless(said.out) and harmless(said.err)


def test_scores_of_a_question_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = {"question_id": "a", "image": "a.png", "text": "q", "category": f"[red]{EVIL}"}
    (tmp_path / "q.jsonl").write_text(json.dumps({**question, "answer": "7"}) + "\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"question_id": "a", "text": "7"}) + "\n")
    files = ["--questions", str(tmp_path / "q.jsonl"), "--answers", str(tmp_path / "a.jsonl")]
    assert evaluation_main(["score-digits", *files]) == 0
    said = capsys.readouterr()
    assert harmless(said.out) and "[red]a\\n" in said.out


def test_every_line_goes_through_one_function() -> None:
    """No text with something filled in is written to a stream as it is."""
    raw = re.compile(r"sys\.std(?:out|err)\.write(?:lines)?\(\s*\(?f?\"[^\"]*\{")
    found = []
    for folder in ("dattn_mcore", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name == "console.py" and path.parent.name == "dattn_mcore":
                continue
            found += [f"{path}: {match[0]}" for match in raw.finditer(path.read_text())]
    assert found == []
