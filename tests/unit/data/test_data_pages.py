"""`check`, `stats` and `preview`: what they say, and that a browser shows their pages."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dattn_mcore.data.__main__ import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="the Debian package chromium is absent")


@pytest.fixture(scope="module")
def data(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy data, some of it spoilt, some of it over budget, one with text that HTML must escape."""
    folder = tmp_path_factory.mktemp("pages")
    shutil.copytree(toy_data / "images", folder / "images")
    records = json.loads((toy_data / "toy.json").read_text())
    (folder / "images" / "11.png").unlink()
    cut = folder / "images" / "12.png"
    cut.write_bytes(cut.read_bytes()[:-2000])
    records[20]["conversations"][1]["value"] = "7 " * 400
    records[0]["conversations"] = [
        {"from": "human", "value": "<image>\nis <script>alert(1)</script> & é\u2028 shown?"},
        {"from": "gpt", "value": "yes & <b>"},
    ]
    (folder / "toy.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def command(data: Path, toy_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    # A command that ran earlier in this process writes to a stream that is gone.
    logger = logging.getLogger("dattn_mcore")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    settings = [
        f"data.annotations={data / 'toy.json'}",
        f"data.image_folder={data / 'images'}",
        f"data.tokenizer={toy_model}",
        "data.template=mistral",
        "data.prepare=none",
        "model.vision.image_size=56",
        "model.vision.patch_size=14",
        "data.text_budget=160",
        "data.visual_budget=64",
        "train.global_batch_size=12",
        "data.image_backend=pillow",
    ]

    def run(name: str, *arguments: Any, last: Sequence[str] = ()) -> int:
        return main([name, "--workers", "0", *map(str, arguments), *settings, *last])

    return run


def test_check_lists_everything(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("check", "--report", tmp_path / "found.jsonl") == 1
    assert command("check", "--decode", "--report", tmp_path / "decoded.jsonl") == 1
    said = capsys.readouterr().out
    assert "40 samples, 39 images: 2 cannot be trained on" in said
    assert "40 samples, 39 images: 3 cannot be trained on" in said
    found = [json.loads(line) for line in (tmp_path / "decoded.jsonl").read_text().splitlines()]
    # Image 12 is cut: seen by decoding only.
    assert [(f["id"], f["path"], f["stage"]) for f in found[:2]] == [
        ("r11", "11.png", "image"),
        ("r20", None, "budget"),
    ]
    assert {(f["id"], f["path"], f["stage"]) for f in found[2:]} == {("r12", "12.png", "decode")}


def shown(page: Path, tmp_path: Path) -> tuple[str, Image.Image]:
    """The document as the browser has it, and a picture of the page."""
    assert CHROMIUM is not None
    picture = tmp_path / "page.png"
    flags = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--window-size=1100,3000",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--timeout=20000",
        "--log-level=0",
    ]
    done = subprocess.run(
        [*flags, "--dump-dom", f"--screenshot={picture}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr  # an error or a warning of the page
    return done.stdout, Image.open(picture).convert("RGB")


def has_colour(picture: Image.Image, colour: str, pixels: int) -> bool:
    wanted = [int(colour[i : i + 2], 16) for i in (0, 2, 4)]
    return int((np.abs(np.asarray(picture).astype(int) - wanted).max(-1) <= 2).sum()) >= pixels


@needs_browser
def test_preview_in_a_browser(command: Callable[..., int], tmp_path: Path) -> None:
    page = tmp_path / "preview.html"
    assert command("preview", "--output", page, "--id", "r0", "--id", "r7", "--id", "r12") == 0
    text = page.read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text)  # nothing from elsewhere
    document, picture = shown(page, tmp_path)
    assert (
        "<script>alert" not in document and "is &lt;script&gt;alert(1)&lt;/script&gt;" in document
    )
    sections = document.split('<section class="sample">')[1:]
    assert [re.search("<h2>(.*?)</h2>", s)[1] for s in sections] == ["r0", "r7", "r12"]
    assert [s.count("<img") for s in sections] == [
        2,
        4,
        1,
    ]  # original and tile; the bad one is grey
    assert "image '12.png' is truncated" in sections[2]
    predicted = "".join(re.findall('<span class="supervised[^"]*">(.*?)</span>', sections[0], re.S))
    assert predicted == " yes &amp; &lt;b&gt;&lt;eos&gt;"
    masked = re.findall('<span class="masked( special)?">(.*?)</span>', sections[0], re.S)
    assert [m[1] for m in masked if m[0]] == ["&lt;bos&gt;", "[INST]", "[/INST]"]
    assert sections[1].count('<span class="image">') == 2
    for colour in ("b7e4b0", "e8e8e8", "bcd7f5"):
        assert has_colour(picture, colour, 300), colour
    assert has_colour(picture, "7f7f7f", 112 * 112)  # the grey tile


@needs_browser
def test_stats_in_a_browser(command: Callable[..., int], tmp_path: Path) -> None:
    page = tmp_path / "stats.html"
    assert command("stats", "--output", page, "--dp", "2") == 0
    document, picture = shown(page, tmp_path)
    tables = {
        name: re.findall(r"<tr>(.*?)</tr>", body, re.S)
        for name, body in re.findall(r'<table id="(\w+)">(.*?)</table>', document, re.S)
    }
    cells = {
        name: [re.findall("<td>(.*?)</td>", row) for row in rows[1:]]
        for name, rows in tables.items()
    }
    assert cells["sources"] == [["toy", "40", "39", "1"]]
    assert cells["reasons"] == [["image does not exist", "1"]]
    assert cells["formats"] == [["PNG", "39"]] and cells["tiles"] == [["1", "39"]]
    assert cells["lengths"][1][-1] == str(39 * 16)
    packing = dict(cells["packing"])
    assert packing["samples over budget, left out"] == "1" and packing["steps planned"] == "3"
    assert float(packing["heaviest rank above the mean"].split()[0]) < 30
    assert has_colour(picture, "3b7dd8", 1000)  # the bars
    assert re.findall('<img[^>]* alt="([^"]*)"', document) == [
        "histograms of lengths and image sizes",
        "tiles, fill of packs and balance of ranks",
    ]
    assert has_colour(picture, "999999", 100)  # text rows of the packs


def test_nothing_to_show_is_one_line(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "none.json").write_text('[{"id": "a"}, 3]')
    for name in ("stats", "preview"):
        page = tmp_path / "page.html"
        assert command(name, "--output", page, last=[f"data.annotations={tmp_path}/none.json"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: none of 2 samples is usable; why stands in '")
        assert (
            "bad.jsonl', and `python -m dattn_mcore.data check`" in said and said.count("\n") == 1
        )
        assert not page.exists()


def test_mistakes_are_one_line(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("preview", "--output", tmp_path / "p.html", "--id", "r11") == 2
    assert "error: --id r11: no usable sample has this id" in capsys.readouterr().err
    assert command("stats", "--output", tmp_path / "no" / "s.html") == 2
    assert "cannot be written (No such file or directory)" in capsys.readouterr().err
