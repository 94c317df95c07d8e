"""The command line: what it prints, and one clear line for every mistake."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dattn_mcore.architectures.tables import model_table
from dattn_mcore.data.tokenizer import load_tokenizer, train_tokenizer
from tests.unit.checkpoint.runs import seal
from tests.unit.convert.convert_helpers import (
    make_checkpoint,
    make_tokenizer,
    plan,
    random_tensors,
    small_config,
)
from tools.checkpoint_convert.__main__ import main
from tools.checkpoint_convert.dist_checkpoint import write_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with two checkpoints, and an export of the newest."""
    folder = tmp_path_factory.mktemp("run")
    config = small_config(make_tokenizer(folder))
    make_checkpoint(folder / "checkpoints/step_00000010", config)
    make_checkpoint(folder / "checkpoints/step_00000020", config)
    (folder / "checkpoints/step_00000030.tmp").mkdir()
    assert main(["mcore-to-hf", "--no-check", str(folder), str(folder / "hf")]) == 0
    return folder


def fails(capsys, *arguments):
    """Runs a command that must fail with one line; returns the line."""
    assert main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_newest_checkpoint_of_a_run_is_exported(run, tmp_path, capsys):
    """The output names what was read."""
    assert main(["mcore-to-hf", "--no-check", str(run), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "step_00000020" in out and "not checked, because of --no-check" in out
    assert main(["hf-to-mcore", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    assert (tmp_path / "back/dattn.json").is_file()


def test_inspect(run, capsys):
    """Both kinds, with the list of tensors."""
    assert main(["inspect", str(run), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "linear_kv.weight" in out and "Mistral (mistral), 3 layers of 32" in out
    assert main(["inspect", str(run / "hf")]) == 0
    assert "Hugging Face folder" in capsys.readouterr().out


@pytest.mark.parametrize("several", [(), ("--processes", "2")])
def test_existing_output_is_refused(run, tmp_path, capsys, several):
    """And left as it is."""
    (tmp_path / "out").mkdir()
    assert "exists" in fails(capsys, "mcore-to-hf", run, tmp_path / "out", *several)
    assert "exists" in fails(capsys, "hf-to-mcore", run / "hf", tmp_path / "out", *several)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_no_checkpoint(tmp_path, capsys):
    """A folder without a checkpoint, or no folder at all: the error is all that is printed."""
    for source, message in ((tmp_path, "no finished checkpoint"), (tmp_path / "x", "not exist")):
        assert main(["mcore-to-hf", str(source), str(tmp_path / "out")]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and len(printed.err.splitlines()) == 1
        assert printed.err.startswith("error: ") and message in printed.err


def test_every_key_that_does_not_fit_is_named(tmp_path, capsys):
    """Missing, extra and wrongly shaped tensors, all in one line; optimizer state is ignored."""
    config = small_config(make_tokenizer(tmp_path))
    table = model_table(config.model)
    tensors = random_tensors(table)
    tensors["optimizer.state.exp_avg.embedding.word_embeddings.weight", None] = torch.ones(3)
    write_checkpoint(tmp_path / "good", plan(table, tensors), config)
    assert main(["inspect", str(tmp_path / "good")]) == 0
    del tensors["projector.norm.weight", None]
    tensors["stranger.weight", None] = torch.ones(3)
    tensors["decoder.final_layernorm.weight", None] = torch.ones(31)
    write_checkpoint(tmp_path / "a", plan(table, tensors), config)
    error = fails(capsys, "mcore-to-hf", tmp_path / "a", tmp_path / "out")
    assert "3 tensors" in error
    assert "missing projector.norm.weight" in error
    assert "extra stranger.weight" in error
    assert "decoder.final_layernorm.weight is [31] instead of [32]" in error
    assert not list(tmp_path.glob("*out*"))


def test_models_that_the_architecture_cannot_express(tmp_path, capsys):
    """A Mistral with a soft-cap has no Hugging Face form."""
    config = small_config(make_tokenizer(tmp_path))
    llm = replace(config.model.llm, attention_softcap=20.0, query_scale=5.0)
    config = replace(config, model=replace(config.model, llm=llm))
    make_checkpoint(tmp_path / "a", config)
    error = fails(capsys, "mcore-to-hf", tmp_path / "a", tmp_path / "out")
    assert "attention_softcap=20.0" in error and "query_scale=5.0" in error
    assert not list(tmp_path.glob("*out*"))


def copy_export(run, folder):
    """A copy of the export, with links to nothing."""
    folder.mkdir()
    for file in (run / "hf").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("several", [(), ("--processes", "2")])
def test_damaged_exports(run, tmp_path, capsys, several):
    """Missing shard, truncated shard, index outside the folder, another architecture, a pickle."""
    out = tmp_path / "out"

    pickled = copy_export(run, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "only safetensors are read" in fails(capsys, "hf-to-mcore", pickled, out, *several)

    missing = copy_export(run, tmp_path / "missing")
    (missing / "model.safetensors").unlink()
    assert "model.safetensors is missing" in fails(capsys, "hf-to-mcore", missing, out, *several)

    cut = copy_export(run, tmp_path / "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[:-50])
    assert "is damaged" in fails(capsys, "hf-to-mcore", cut, out, *several)

    outside = copy_export(run, tmp_path / "outside")
    for file in ("../x.safetensors", "/x.safetensors", "a/../../x.safetensors", ".."):
        index = {"weight_map": {"lm_head.weight": file}}
        (outside / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "own folder" in fails(capsys, "hf-to-mcore", outside, out, *several)

    partial = copy_export(run, tmp_path / "partial")
    weights = load_file(partial / "model.safetensors")
    weights.pop("lm_head.weight")
    weights["surprise"] = torch.ones(2)
    save_file(weights, partial / "model.safetensors")
    error = fails(capsys, "hf-to-mcore", partial, out, *several)
    assert "missing lm_head.weight" in error and "extra surprise" in error

    other = copy_export(run, tmp_path / "other")
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "'llama'" in fails(capsys, "hf-to-mcore", other, out, *several)
    assert not list(tmp_path.glob("*out")) and not list(tmp_path.glob(".out*"))


def test_zeros_that_are_not_zero(tmp_path, capsys):
    """A position-free folder whose tower has positions is not silently cut."""
    config = small_config(make_tokenizer(tmp_path), visual_positions=False)
    make_checkpoint(tmp_path / "a", config)
    assert main(["mcore-to-hf", "--no-check", str(tmp_path / "a"), str(tmp_path / "hf")]) == 0
    file = tmp_path / "hf/model.safetensors"
    weights = load_file(file)
    weights["model.vision_tower.embeddings.position_embedding.weight"] += 1
    save_file(weights, file, metadata={"format": "pt"})
    assert "must be zeros" in fails(capsys, "hf-to-mcore", tmp_path / "hf", tmp_path / "out")


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path, capsys):
    """Its ids would read beyond the embedding."""
    make_checkpoint(tmp_path / "a", small_config(make_tokenizer(tmp_path), vocab_size=200))
    error = fails(capsys, "mcore-to-hf", tmp_path / "a", tmp_path / "out")
    assert "has 320 tokens, model.llm.vocab_size is 200" in error


def test_rotary_scaling_is_refused(run, tmp_path, capsys):
    """A setting of config.json that the trainer has no field for."""
    other = copy_export(run, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0}
    (other / "config.json").write_text(json.dumps(config))
    assert "rope_type is 'linear'" in fails(capsys, "hf-to-mcore", other, tmp_path / "out")


def test_the_tokenizer_is_the_runs_own(tmp_path, capsys, monkeypatch):
    """Found from any folder; one that was changed since is not taken in its place."""
    home = tmp_path / "home"
    home.mkdir()
    tokenizer = make_tokenizer(home)
    monkeypatch.chdir(home)
    make_checkpoint(home / "a", small_config(Path("tokenizer.model")))
    manifest = json.loads((home / "a/dattn.json").read_text())
    manifest["tokenizer"]["fingerprint"] = load_tokenizer(tokenizer).fingerprint
    seal(home / "a", manifest)
    monkeypatch.chdir(tmp_path)
    assert main(["mcore-to-hf", "--no-check", str(home / "a"), "hf"]) == 0

    whole = tokenizer.read_bytes()
    train_tokenizer(("Other texts give other pieces.",), tokenizer)
    error = fails(capsys, "mcore-to-hf", home / "a", "out")
    assert f"{tokenizer} is not the tokenizer of the run" in error and "--tokenizer" in error
    tokenizer.unlink()
    error = fails(capsys, "mcore-to-hf", home / "a", "out")
    assert f"data.tokenizer of the run: '{tokenizer}' does not exist" in error
    assert error.endswith("name the run's tokenizer by --tokenizer")
    assert fails(capsys, "mcore-to-hf", home / "a", "out", "--tokenizer", "x").startswith(
        "error: --tokenizer: 'x' does not exist"
    )
    (tmp_path / "tokenizer.model").write_bytes(whole)  # moved with the run, to where it is started
    assert main(["mcore-to-hf", "--no-check", str(home / "a"), "out"]) == 0
