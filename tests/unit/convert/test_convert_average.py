"""`average`: the plain mean of exported weights, whole or not there, of one model only."""

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dattn_mcore.architectures.tables import model_table
from dattn_mcore.config.schema import CheckpointConfig
from tests.unit.checkpoint.runs import small_run
from tests.unit.convert.convert_helpers import make_tokenizer, plan, random_tensors, small_config
from tools.checkpoint_convert.__main__ import main
from tools.checkpoint_convert.average import AverageOptions, average
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint, write_checkpoint
from tools.checkpoint_convert.mcore_to_hf import convert
from tools.checkpoint_convert.raw_folders import same_bits
from tools.checkpoint_convert.safetensors_folder import SafetensorsFolder

ROOT = Path(__file__).resolve().parents[3]
# Kills the process while it makes a tensor in the middle.
KILLED = """
import os, signal, sys
import tools.checkpoint_convert.__main__ as command
from tools.checkpoint_convert import average
whole, calls = average._mean, []
def mean(*arguments):
    calls.append(0)
    if len(calls) == 9:
        os.kill(os.getpid(), signal.{name})
    return whole(*arguments)
average._mean = mean
sys.exit(command.average(sys.argv[1:]))
"""


def written(folder, config, seeds, dtype=torch.float32):
    """Checkpoints of random weights."""
    table, paths = model_table(config.model), []
    for seed in seeds:
        path = folder / f"seed_{seed}"
        write_checkpoint(path, plan(table, random_tensors(table, dtype, seed)), config)
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return small_config(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def three(config, tmp_path_factory):
    return written(tmp_path_factory.mktemp("three"), config, (1, 2, 3))


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A run with checkpoints of steps 1 to 4."""
    root = tmp_path_factory.mktemp("run")
    checkpoint = replace(CheckpointConfig(), keep=9)
    with small_run(root / "checkpoints", replace(config, checkpoint=checkpoint)) as small:
        for step in (1, 2, 3, 4):
            small.step(step)
            small.saver.save(step)
    return root


def exported(path, folder):
    convert(path, folder)
    return SafetensorsFolder(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out", ["same", "float32"])
def test_it_is_the_plain_mean_of_exported_weights(config, tmp_path, dtype, out):
    """To the last bit: the mean in float64, rounded once."""
    paths = written(tmp_path, config, (1, 2, 3), dtype)
    average(paths, tmp_path / "mean", AverageOptions(dtype=out))
    mean = exported(tmp_path / "mean", tmp_path / "hf_mean")
    parts = [exported(path, tmp_path / f"hf_{path.name}") for path in paths]
    for name, kind in mean.dtypes.items():
        assert kind == (torch.float32 if out == "float32" else parts[0].dtypes[name])
        want = torch.stack([part.read(name).double() for part in parts]).sum(0) / 3
        assert same_bits(mean.read(name), want.to(kind)), name


def test_the_order_makes_no_difference(three, tmp_path):
    average(three, tmp_path / "one")
    average(three[::-1], tmp_path / "other")
    one, other = DistCheckpoint(tmp_path / "one"), DistCheckpoint(tmp_path / "other")
    assert one.tokenizer == DistCheckpoint(three[0]).tokenizer
    for key in one.shapes:
        # Sums of three float64 numbers may differ in their last bit, which float32 does not show.
        torch.testing.assert_close(one.read(key), other.read(key), rtol=1.2e-7, atol=0)


@pytest.mark.parametrize(("last", "steps"), [(2, (3, 4)), (None, (1, 2, 3, 4))])
def test_the_last_of_a_run(run, tmp_path, capsys, last, steps):
    """By the command, which says what it took, the newest first."""
    more = [] if last is None else ["--last", str(last)]
    assert main(["average", str(run), str(tmp_path / "mean"), *more]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"step_0000000(\d)", said) == [str(step) for step in reversed(steps)]
    sources = [DistCheckpoint(run / f"checkpoints/step_0000000{step}") for step in steps]
    mean = DistCheckpoint(tmp_path / "mean")
    for key in mean.shapes:
        want = sum(source.read(key).double() for source in reversed(sources)) / len(steps)
        assert same_bits(mean.read(key), want.float()), key


def test_a_run_starts_from_it(run, config, tmp_path):
    from dattn_mcore.checkpoint.load import load_weights

    average([run], tmp_path / "mean")
    mean = DistCheckpoint(tmp_path / "mean")
    with small_run(tmp_path / "checkpoints", config) as small:
        load_weights(tmp_path / "mean", config, small.chunks, small.groups)
        loaded = small.weights()
    whole = set(mean.shapes) & set(loaded)  # those that are no layers of a stack
    assert "embedding.word_embeddings.weight" in whole and len(whole) > 4
    for name in whole:
        assert same_bits(loaded[name], mean.read(name)), name


def files(folder):
    """What the index says of its own making (a random number) aside."""
    unlike = (".metadata", "dattn.json")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in unlike}


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_killed_and_started_again(three, tmp_path, name):
    average(three, tmp_path / "whole")
    arguments = [*map(str, three), str(tmp_path / "mean")]
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(name=name), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    hard = name == "SIGKILL"
    assert done.returncode == (-signal.SIGKILL if hard else 128 + signal.SIGTERM), done.stderr
    left = sorted(path.name for path in tmp_path.iterdir())
    assert not (tmp_path / "mean").exists() and len(left) == (2 if hard else 1), left
    average(three, tmp_path / "mean")
    assert files(tmp_path / "mean") == files(tmp_path / "whole")
    mean, whole = DistCheckpoint(tmp_path / "mean"), DistCheckpoint(tmp_path / "whole")
    assert [mean.place(key) for key in mean.shapes] == [whole.place(key) for key in whole.shapes]


def fails(capsys, *arguments):
    """The one line of a command that must fail, with nothing left of its output."""
    assert main(["average", *map(str, arguments)]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()  # behind the progress
    assert not Path(arguments[-1]).exists()
    return line.removeprefix("error: ")


def test_one_clear_line(three, run, config, tmp_path, capsys):
    out = tmp_path / "mean"
    llm = replace(config.model.llm, ffn_hidden_size=64)
    wide = replace(config, model=replace(config.model, llm=llm))
    (other,) = written(tmp_path / "wide", wide, (1,))
    assert fails(capsys, three[0], other, out) == (
        f"{other} is of another model than {three[0]}: model.llm.ffn_hidden_size is 64 there and "
        "48 here; only checkpoints of one model have a mean"
    )
    causal = replace(config, attention=replace(config.attention, v2v="causal"))
    (other,) = written(tmp_path / "causal", causal, (1,))
    assert "attention.v2v is 'causal' there and 'diagonal' here" in fails(
        capsys, three[0], other, out
    )
    (other,) = written(tmp_path / "bf16", config, (1,), torch.bfloat16)
    assert fails(capsys, three[0], other, out).endswith(
        "in float32; average checkpoints of one train.precision"
    )
    assert fails(capsys, run, "--last", "5", out) == (
        f"{run} holds 4 whole checkpoints, and the mean is of 5; raise checkpoint.keep or set "
        "checkpoint.keep_every in the run, or name other checkpoints"
    )
    assert fails(capsys, three[0], out).startswith(f"{three[0]} holds 0 whole checkpoints")
    assert fails(capsys, *three, "--last", "2", out) == (
        "--last takes one run folder; name that, or leave --last out"
    )
    assert "holds no running mean of the weights" in fails(capsys, *three, "--ema", out)
    assert fails(capsys, tmp_path / "no", three[0], out) == f"{tmp_path / 'no'} does not exist"


def test_another_tokenizer_is_refused(config, run, tmp_path, capsys):
    """Rows of the vocabulary would mean other tokens."""
    first = run / "checkpoints/step_00000001"
    with small_run(tmp_path / "checkpoints", config) as small:
        small.saver.tokenizer = {**small.saver.tokenizer, "fingerprint": "another"}
        other = small.saver.save(1)
    assert fails(capsys, first, other, tmp_path / "mean") == (
        f"{other} was trained with another tokenizer than {first}: their rows of the vocabulary "
        "mean other tokens; average checkpoints of one data.tokenizer"
    )


def test_damage_is_found_before_the_output_has_its_name(three, tmp_path, capsys):
    """A flipped bit, which only the hash of the file shows."""
    copy = shutil.copytree(three[0], tmp_path / "copy")
    shard = next(copy.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    place = DistCheckpoint(copy).place("embedding.word_embeddings.weight")[1]
    content[place + 2000] ^= 1
    shard.write_bytes(content)
    said = fails(capsys, three[1], copy, tmp_path / "mean")
    assert "was altered (SHA-256 differs)" in said
