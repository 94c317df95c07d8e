"""`gpu_check`: its list, its time, what it keeps; with a simulated list, for there is no GPU here."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import gpu_check, gpu_packages
from benchmarks.gpu_items import CPU, GPU, SHORT, TESTS, Item, arguments_of, items_for
from benchmarks.run_items import run_all, run_item
from dattn_mcore.layers.attention.flash import FlashBackend
from dattn_mcore.parallel import gpus

ROOT = Path(__file__).parents[3]
TABLE = "print('words'); print('| a |'); print('| --- |'); print('| 1 |')"


def item(name, code, minutes=0.5, kind="benchmark"):
    return Item(name, kind, f"-c {shlex.quote(code)}", minutes)


def plain(one):
    return shlex.split(one.command)


def test_each_ends_in_its_own_way_and_the_next_goes_on(tmp_path):
    items = [
        item("good", TABLE),
        item("bad", "import sys; print('before'); sys.exit('no memory left')"),
        item("hangs", "import time; print('starts', flush=True); time.sleep(60)", minutes=0.01),
        item("too-long", TABLE, minutes=100),
        item("small", "print('| b |')"),
    ]
    seen = []
    started = time.monotonic()
    run_all(items, plain, tmp_path, 0.9, lambda one, result: seen.append(result))
    assert time.monotonic() - started < 30
    assert [(one.name, one.outcome) for one in seen] == [
        ("good", "passed"),
        ("bad", "failed"),
        ("hangs", "stopped"),
        ("too-long", "no time"),
        ("small", "passed"),
    ]
    assert seen[1].note == "exit status 1: no memory left" and seen[1].output == "before\n"
    assert seen[2].output == "starts\n" and 1 < seen[2].seconds < 20
    assert seen[3].note.startswith("needs 100 min, 0.") and seen[3].seconds == 0
    assert "no memory left" in (tmp_path / "bad.log").read_text()
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["outcome"] for row in rows] == [one.outcome for one in seen]
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert [len(case) for case in suite] == [0, 1, 1, 1, 0]
    assert [case[0].tag for case in suite if len(case)] == ["failure", "failure", "skipped"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10_000


def test_a_log_keeps_the_end_alone(tmp_path):
    code = "print('first'); print('x' * 100_000); print('last')"
    run_item(item("loud", code), ["-c", code], 60, tmp_path / "loud.log")
    text = (tmp_path / "loud.log").read_text()
    assert len(text) < 25_000 and "\nlast\n" in text and "\nfirst\n" not in text


def test_what_a_stopped_item_started_ends_with_it(tmp_path):
    """And without the budget there is still a limit."""
    code = (
        "import subprocess, sys, time;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    (result,) = run_all([item("forks", code, minutes=0.02)], plain, tmp_path, None, lambda *_: None)
    assert result.outcome == "stopped"
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        state = Path(f"/proc/{child}/stat")
        if state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("it still runs")


def page_for(tmp_path, names, device):
    page = tmp_path / "page.md"
    sections = [*(f"{name}-{device}" for name in names), "gpu-check"]
    page.write_text("".join(f"<!-- begin {s} -->\n<!-- end {s} -->\n" for s in sections))
    return page


def test_the_page_gets_tables_and_says_what_failed(tmp_path, monkeypatch):
    items = [item("good", TABLE), item("bad", "raise SystemExit('no memory left')")]
    monkeypatch.setattr(gpu_check, "items_for", lambda device, tests, short: items)
    monkeypatch.setattr(gpu_check, "arguments_of", lambda one, device, folder: plain(one))
    page = page_for(tmp_path, ["good", "bad"], "cpu")
    out = tmp_path / "out"
    command = ["--device", "cpu", "--page", str(page), "--out", str(out)]
    assert gpu_check.main(command) == 1
    good, bad = page.read_text().split("<!-- end good-cpu -->")
    assert "| a |\n| --- |\n| 1 |\n" in good and "words" not in good
    assert "failed (exit status 1: no memory left)" in bad
    assert (out / "page.md").read_text() == page.read_text()
    assert gpu_check.main([*command, "--only", "good"]) == 0
    with pytest.raises(SystemExit, match="--only other: items are good, bad"):
        gpu_check.main([*command, "--only", "other"])


@pytest.fixture
def simulated_gpu(tmp_path, monkeypatch):
    """A list on a machine with a GPU that no item uses; no packages are looked for."""
    monkeypatch.setattr(gpus, "gpu_available", lambda: True)
    items = [item("good", TABLE), item("long", TABLE, minutes=100)]
    monkeypatch.setattr(gpu_check, "items_for", lambda device, tests, short: items)
    monkeypatch.setattr(gpu_check, "arguments_of", lambda one, device, folder: plain(one))
    page = page_for(tmp_path, ["good", "long"], "gpu")
    return page, ["--page", str(page), "--out", str(tmp_path / "out")]


@pytest.mark.parametrize("te", [None, "it is not installed"])
@pytest.mark.parametrize("flag", [[], ["--without-te"]])
def test_a_gpu_without_transformer_engine_does_not_pass_unasked(
    te, flag, simulated_gpu, monkeypatch, capsys
):
    """The items pass here; the packages' lines come first and last."""
    page, arguments = simulated_gpu
    monkeypatch.setattr(gpu_packages, "transformer_engine_missing", lambda: te)
    monkeypatch.setattr(FlashBackend, "refuses", lambda *layer: "flash is gone")
    monkeypatch.setattr(gpu_check, "say_what_is_skipped", lambda: gpu_packages.main() == 0)
    status = gpu_check.main([*arguments, "--minutes", "1", *flag])
    assert status == int(te is not None and not flag)
    lines = capsys.readouterr().out.splitlines()
    skipped = [line for line in lines if line.startswith("skipped without ")]
    half = skipped[: len(skipped) // 2]
    assert skipped == 2 * half and lines[0] == skipped[0] and lines[-1] == skipped[-1]
    assert any("flash is gone" in line and "'.[flash]'" in line for line in half)
    te_lines = [line for line in half if line.startswith("skipped without Transformer Engine: ")]
    assert len(te_lines) == (te is not None)
    text = page.read_text()
    assert 'What `make gpu-check ARGS="--minutes 1"` last ran:' in text
    assert "| good | passed |" in text and "| long | no time | 0 | needs 100 min, " in text
    assert "| a |" in text
    assert "<!-- begin long-gpu -->\n<!-- end long-gpu -->" in text  # it did not start


def test_without_a_gpu_one_line_says_why(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "benchmarks.gpu_check",
            "--out",
            str(tmp_path / "o"),
        ],
        cwd=ROOT,
        env={**os.environ, **gpus.without_gpus()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not (tmp_path / "o").exists()
    assert "error: it needs a GPU: PyTorch sees none on this machine" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_a_missing_package_is_named_and_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "NEEDED", ("torch", "no_such.package"))
    with pytest.raises(SystemExit) as ended:
        gpu_check.main([])
    assert ended.value.code == 2
    assert "lacks no_such.package, and gpu-check installs nothing" in capsys.readouterr().err


def test_lists():
    for tests in TESTS:
        for short in (False, True):
            names = [one.name for one in items_for("gpu", tests, short)]
            assert len(set(names)) == len(names) and names[0] == "doctor"
    assert items_for("cpu", "all", True) == list(CPU)
    first = items_for("gpu", "short", True)
    assert sum(one.minutes for one in first[:5]) <= 8 < sum(one.minutes for one in first)
    kinds = [one.kind for one in first]
    assert kinds.index("benchmark") == kinds.count("report") + kinds.count("tests")
    assert {one.name for one in SHORT} == {one.name for one in GPU}


def test_tests_of_the_short_list_exist():
    """pytest finds some with each selection."""
    for one in items_for("gpu", "short", True):
        if one.kind == "tests":
            arguments = arguments_of(one, "gpu", "/nowhere")
            assert "--junitxml=/nowhere/" + one.name + ".xml" in arguments
            words = shlex.split(one.command)[2:]
            found = subprocess.run(
                [sys.executable, "-W", "ignore", "-m", "pytest", "--collect-only", *words],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            assert found.returncode == 0 and "::" in found.stdout, found.stdout


def test_the_page_has_a_section_for_every_table():
    text = gpu_check.PAGE.read_text()
    sections = [f"{one.name}-cpu" for one in CPU] + [f"{one.name}-gpu" for one in (*GPU, *SHORT)]
    for section in (*sections, "gpu-check"):
        assert f"<!-- begin {section} -->" in text and f"<!-- end {section} -->" in text
