"""Several processes give what one gives, bit for bit, and end together when one of them fails."""

import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dattn_mcore.config.load import to_yaml
from dattn_mcore.errors import CheckpointError
from tests.unit.convert.convert_helpers import make_tokenizer
from tests.unit.convert.raw_models import make_llm, make_tower, raw_config
from tools.checkpoint_convert.__main__ import main
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint
from tools.checkpoint_convert.mcore_to_hf import ExportOptions
from tools.checkpoint_convert.mcore_to_hf import convert as export
from tools.checkpoint_convert.raw_folders import same_bits
from tools.checkpoint_convert.safetensors_folder import SafetensorsFolder
from tools.checkpoint_convert.verify import verify
from tools.checkpoint_convert.workers import in_shares, run_shares

HERE = os.getpid()
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Folders of a bf16 Gemma 2 in shards and of a tower; what one process makes of them."""
    folder = tmp_path_factory.mktemp("one")
    config = raw_config("gemma2", "siglip")
    data = replace(config.data, tokenizer=str(make_tokenizer(folder)), template="plain")
    config = replace(config, data=data)
    make_llm(folder / "llm", config, torch.bfloat16, shard="20KB")
    make_tower(folder / "vision", config)
    (folder / "run.yaml").write_text(to_yaml(config))
    assert main([*there(folder), str(folder / "mcore")]) == 0
    assert (
        main(["mcore-to-hf", "--no-check", *SHARDS, str(folder / "mcore"), str(folder / "hf")]) == 0
    )
    return folder


SHARDS = ("--max-shard-size", "40KB")


def there(folder):
    """The command from Hugging Face, but for the output."""
    parts = (("--llm", "llm"), ("--vision", "vision"), ("--config", "run.yaml"))
    return ["hf-to-mcore", *(str(x) for flag, name in parts for x in (flag, folder / name))]


def test_checkpoints_of_three_processes_hold_the_same(one, tmp_path):
    assert main([*there(one), str(tmp_path / "mcore"), "--processes", "3"]) == 0
    assert len(list((tmp_path / "mcore").glob("*.distcp"))) == 3
    alone, together = DistCheckpoint(one / "mcore"), DistCheckpoint(tmp_path / "mcore")
    assert alone.shapes == together.shapes and alone.dtypes == together.dtypes
    for key in alone.shapes:
        assert same_bits(alone.read(key), together.read(key)), key
    # Loaded by Megatron-Core itself, whose logits are those of transformers.
    found = verify(tmp_path / "mcore", one / "hf")
    assert found.differences == [] and found.logits is not None
    # And back from three files.
    export(tmp_path / "mcore", tmp_path / "hf", ExportOptions(processes=2))
    assert verify(tmp_path / "hf", one / "hf").differences == []


@pytest.mark.parametrize("processes", [2, 3])
def test_exports_of_several_processes_are_the_same_files(one, tmp_path, processes):
    arguments = ["--no-check", *SHARDS, "--processes", str(processes)]
    assert main(["mcore-to-hf", *arguments, str(one / "mcore"), str(tmp_path / "hf")]) == 0
    names = sorted(file.name for file in (one / "hf").iterdir())
    assert sum(name.endswith(".safetensors") for name in names) > 3
    assert names == sorted(file.name for file in (tmp_path / "hf").iterdir())
    for name in names:
        assert (one / "hf" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name


def late(original, action):
    """A method that acts in the forked processes only, after some calls."""
    calls = []

    def method(*arguments):
        calls.append(0)
        if os.getpid() != HERE and len(calls) > 5:
            action()
        return original(*arguments)

    return method


def full_disk():
    raise OSError(28, "No space left on device")


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def bad_source():
    raise CheckpointError("x.safetensors became shorter; copy it again")


ACTIONS = [
    (full_disk, "cannot be written (No space left on device)"),
    (killed, "was killed by SIGKILL; if memory ran out, give fewer --processes"),
    (bad_source, "x.safetensors became shorter"),
]


@pytest.mark.parametrize(("action", "message"), ACTIONS)
@pytest.mark.parametrize("direction", ["hf-to-mcore", "mcore-to-hf"])
def test_all_end_when_one_fails(one, tmp_path, monkeypatch, capsys, direction, action, message):
    """One line, no process and no file left."""
    others = set(multiprocessing.active_children())  # of tests before
    owner = SafetensorsFolder if direction == "hf-to-mcore" else DistCheckpoint
    monkeypatch.setattr(owner, "read", late(owner.read, action))
    command = there(one) if direction == "hf-to-mcore" else [direction, str(one / "mcore")]
    assert main([*command, str(tmp_path / "out"), "--processes", "2"]) == 2
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert set(multiprocessing.active_children()) <= others and list(tmp_path.iterdir()) == []


def test_a_full_disk_in_one_process(one, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "pwrite", lambda *_: full_disk())
    assert main(["mcore-to-hf", str(one / "mcore"), str(tmp_path / "out")]) == 2
    assert "out cannot be written (No space left on device)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_altered_file_is_found_by_the_process_that_checks_it(one, tmp_path, capsys):
    assert main([*there(one), str(tmp_path / "mcore"), "--processes", "2"]) == 0
    source = DistCheckpoint(tmp_path / "mcore")
    key = "embedding.word_embeddings.weight"
    name, _ = source.place(key)
    file = tmp_path / "mcore" / name
    data = bytearray(file.read_bytes())
    data[data.index(source.read(key).view(torch.uint8).numpy().tobytes()) + 100] ^= 1
    file.write_bytes(data)
    arguments = [str(tmp_path / "mcore"), str(tmp_path / "out"), "--processes", "2"]
    assert main(["mcore-to-hf", *arguments]) == 2
    assert f"{name} was altered" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mcore"]


def test_ctrl_c_ends_all(one, tmp_path):
    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    others = set(multiprocessing.active_children())
    with pytest.raises(KeyboardInterrupt):
        export(one / "mcore", tmp_path / "out", ExportOptions(processes=2), interrupt)
    assert set(multiprocessing.active_children()) <= others and list(tmp_path.iterdir()) == []


def test_a_defect_keeps_its_traceback():
    def job(share, report):
        return [][share]

    with pytest.raises(RuntimeError, match="IndexError: list index out of range"):
        run_shares(job, 2, 0, lambda done, total: None)


def test_progress_of_all_is_reported_by_one():
    reports = []

    def job(share, report):
        for _ in range(3):
            report(10 + share)
        return os.getpid()

    pids = run_shares(job, 2, 63, lambda done, total: reports.append((os.getpid(), done, total)))
    assert len({HERE, *pids}) == 3
    assert {pid for pid, _, _ in reports} == {HERE} and {total for *_, total in reports} == {63}
    done = [done for _, done, _ in reports]
    assert done == sorted(done) and len(done) == 6 and done[-1] == 63


@pytest.mark.parametrize("number", ["0", "-1", "two", "1.5"])
def test_a_wrong_number_of_processes(number, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["mcore-to-hf", "a", "b", "--processes", number])
    assert "is no whole number; write for example 2" in capsys.readouterr().err


@given(st.lists(st.integers(0, 1000), min_size=1), st.integers(1, 9))
def test_shares_are_even_and_keep_their_order(sizes, count):
    items = list(enumerate(sizes))
    shares = in_shares(items, count, lambda item: item[1])
    assert len(shares) == min(count, len(items)) and all(shares)
    assert sorted(item for share in shares for item in share) == items
    assert all(share == sorted(share) for share in shares)
    filled = [sum(max(size, 1) for _, size in share) for share in shares]
    assert max(filled) - min(filled) <= max(max(sizes), 1)


STOPPED = """
import os, signal, sys
from tools.checkpoint_convert import __main__, streaming
original, calls = streaming._HashingStream.write, []
def write(*arguments):
    calls.append(0)
    if len(calls) == 20:  # inside PyTorch's writer, which wraps what is raised there
        os.kill(os.getpid(), signal.NAME)
    return original(*arguments)
streaming._HashingStream.write = write
sys.exit(__main__.interruptible())
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_it_with_one_line(one, tmp_path, name):
    script = STOPPED.replace("NAME", name)
    command = [sys.executable, "-c", script, *there(one), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 128 + getattr(signal, name)
    assert done.stderr.splitlines()[-1] == f"stopped by {name}; nothing is left of it"
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


def test_what_a_killed_conversion_left_is_named(one, tmp_path, caplog):
    (tmp_path / ".out.1.tmp").mkdir()
    arguments = ["--no-check", str(one / "mcore"), str(tmp_path / "out")]
    assert main(["mcore-to-hf", *arguments]) == 0
    assert f"{tmp_path}/.out.1.tmp was left by a conversion that was killed" in caplog.text
