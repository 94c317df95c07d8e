"""Folders of Hugging Face that cannot be converted: one clear line each, nothing half-written."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dattn_mcore.config.load import to_yaml
from dattn_mcore.errors import CheckpointError
from tests.unit.convert.convert_helpers import make_tokenizer
from tests.unit.convert.raw_models import make_llm, make_tower, raw_config, rename
from tools.checkpoint_convert.__main__ import main
from tools.checkpoint_convert.atomic_folder import check_free
from tools.checkpoint_convert.hf_to_mcore import convert_parts
from tools.checkpoint_convert.raw_folders import check_fits

CONFIG = raw_config("gemma2", "siglip")


def fails(capsys, *arguments):
    assert main([str(a) for a in arguments]) == 2
    (error,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return error


@pytest.fixture
def parts(tmp_path):
    """Folders and configuration of a small Gemma 2 with SigLIP, and the arguments."""
    config = raw_config("gemma2", "siglip")
    make_llm(tmp_path / "llm", config)
    make_tower(tmp_path / "vision", config)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    names = (("--llm", "llm"), ("--vision", "vision"), ("--config", "run.yaml"))
    return [str(x) for flag, name in names for x in (flag, tmp_path / name)]


def test_every_tensor_that_does_not_fit_is_named_at_once(tmp_path, capsys, parts):
    file = tmp_path / "llm/model.safetensors"
    weights = load_file(file)
    weights.pop("model.norm.weight")
    weights["stranger"] = torch.ones(3)
    weights["model.layers.0.mlp.up_proj.weight"] = torch.ones(2, 2)
    name = "model.layers.1.self_attn.q_proj.weight"
    weights[name] = weights[name].to(torch.bfloat16)
    weights["model.layers.2.input_layernorm.weight"] = torch.ones(32, dtype=torch.int32)
    save_file(weights, file, metadata={"format": "pt"})
    error = fails(capsys, "hf-to-mcore", *parts, tmp_path / "out")
    start = "model.language_model."
    assert "5 tensors" in error and f"missing {start}norm.weight" in error
    assert "extra stranger" in error
    assert f"{start}layers.0.mlp.up_proj.weight is [2, 2] instead of [48, 32]" in error
    assert "q_proj.weight is bfloat16 instead of float32" in error
    assert "layers.2.input_layernorm.weight is int32 instead of float32" in error
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".out*"))


def test_another_models_folders(tmp_path, capsys, parts):
    """Every setting that differs is named; so is another architecture."""
    other = raw_config("gemma2", "siglip", query_scale=8.0, num_query_groups=4)
    other = replace(other, data=replace(other.data, image_mean=(0.1, 0.2, 0.3)))
    (tmp_path / "run.yaml").write_text(to_yaml(other))
    pixels_of = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "vision/preprocessor_config.json").write_text(json.dumps(pixels_of))
    error = fails(capsys, "hf-to-mcore", *parts, tmp_path / "out")
    assert "model.llm.query_scale is 24.0" in error and "and 8.0" in error
    assert "model.llm.num_query_groups is 2" in error
    assert "data.image_mean is [0.5, 0.5, 0.5]" in error
    (tmp_path / "vision/processor_config.json").write_text('{"image_processor": [1]}')
    malformed = fails(capsys, "hf-to-mcore", *parts, tmp_path / "out")
    assert "processor_config.json is malformed" in malformed
    (tmp_path / "vision/processor_config.json").unlink()
    swapped = [parts[0], parts[3], parts[2], parts[1], *parts[4:]]
    assert "a language model must be one of" in fails(
        capsys, "hf-to-mcore", *swapped, tmp_path / "out"
    )
    assert not list(tmp_path.glob("*out*"))


def test_bad_folders(tmp_path, capsys, parts):
    """A missing shard, a pickle, an index that leads outside, a head that is not tied."""
    out = tmp_path / "out"
    file = tmp_path / "llm/model.safetensors"
    rename(tmp_path / "llm", lambda name: name)  # as a plain file
    weights = load_file(file)
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file)
    assert main(["hf-to-mcore", *parts, str(tmp_path / "tied")]) == 0
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1}, file)
    assert "differs from model.embed_tokens" in fails(capsys, "hf-to-mcore", *parts, out)
    file.rename(tmp_path / "llm/pytorch_model.bin")
    assert "only safetensors are read" in fails(capsys, "hf-to-mcore", *parts, out)
    index = tmp_path / "llm/model.safetensors.index.json"
    for place, message in (("../x.safetensors", "own folder"), ("x.safetensors", "is missing")):
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": place}}))
        assert message in fails(capsys, "hf-to-mcore", *parts, out)
    assert "together" in fails(capsys, "hf-to-mcore", *parts[:2], out)
    assert "together" in fails(capsys, "hf-to-mcore", *parts, "folder", out)
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".out*"))


def test_shards_without_their_index(tmp_path, capsys, parts):
    """What is missing is the index, not a single file that there never was."""
    (tmp_path / "llm/model.safetensors").rename(tmp_path / "llm/model-00001-of-00002.safetensors")
    error = fails(capsys, "hf-to-mcore", *parts, tmp_path / "out")
    assert f"{tmp_path}/llm/model.safetensors.index.json is missing" in error
    assert "model-00001-of-00002.safetensors" in error


@pytest.mark.parametrize("name", ["weights.pt", "pytorch_model.bin"])
def test_a_file_in_place_of_a_checkpoint(tmp_path, capsys, name):
    (tmp_path / name).touch()
    for command in (
        ("mcore-to-hf", tmp_path / name, tmp_path / "out"),
        ("inspect", tmp_path / name),
    ):
        error = fails(capsys, *command)
        assert f"{tmp_path / name} is pickled weights" in error and "safetensors" in error


def test_a_link_that_points_nowhere_is_refused_first(tmp_path, capsys, parts):
    """Not after everything is written: nothing is made beside it."""
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="out is a link that points nowhere"):
        check_free(tmp_path / "out")
    before = sorted(tmp_path.iterdir())
    assert "points nowhere" in fails(capsys, "hf-to-mcore", *parts, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_an_interrupted_conversion_leaves_nothing(tmp_path, parts):
    config = raw_config("gemma2", "siglip")

    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_parts(parts[1], parts[3], config, tmp_path / "out", interrupt)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".out*"))


def test_what_cannot_be_written_is_an_error(tmp_path, parts, monkeypatch, capsys):
    """A full disk, and a source that goes bad midway: one line, nothing left, either way round."""
    from tools.checkpoint_convert import safetensors_folder, streaming

    full = OSError(28, "No space left on device")
    for owner, name in (
        (streaming._HashingStream, "write"),
        (safetensors_folder.SafetensorsFolder, "read"),
    ):
        with monkeypatch.context() as patch:
            original, calls = getattr(owner, name), []

            def fails_late(*args, original=original, calls=calls):
                calls.append(0)
                if len(calls) > 20:
                    raise full
                return original(*args)

            patch.setattr(owner, name, fails_late)
            assert "No space left" in fails(capsys, "hf-to-mcore", *parts, tmp_path / "out")
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".out*"))


def test_an_altered_checkpoint_is_found(tmp_path, parts, capsys):
    """One bit of a weight differs: the export is written beside the check, and does not appear."""
    assert main(["hf-to-mcore", *parts, str(tmp_path / "out")]) == 0
    (file,) = (tmp_path / "out").glob("*.distcp")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    tokenizer = str(make_tokenizer(tmp_path))
    arguments = (tmp_path / "out", tmp_path / "back", "--tokenizer", tokenizer)
    assert "altered" in fails(capsys, "mcore-to-hf", *arguments, "--template", "plain")
    assert not list(tmp_path.glob("*back*")) and not list(tmp_path.glob(".back*"))


def places(fields, path=()):
    """Every field of a configuration."""
    for name, value in fields.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from places(value, (*path, name))


@pytest.mark.parametrize("part", ["llm", "vision"])
def test_malformed_configurations(tmp_path, capsys, parts, part):
    """config.json with any field of another kind, and processor settings: never a traceback."""
    file = tmp_path / part / "config.json"
    whole = json.loads(file.read_text())
    refused = 0
    for path in places(whole):
        for junk in ("x", [1], {}, -1):
            fields = json.loads(json.dumps(whole))
            place = fields
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = junk
            file.write_text(json.dumps(fields))
            try:
                check_fits(tmp_path / "llm", tmp_path / "vision", CONFIG.model, CONFIG.data)
            except CheckpointError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 20
    for text in ("", "[]", "{", '{"model_type": []}'):
        file.write_text(text)
        assert "config.json" in fails(capsys, "hf-to-mcore", *parts, tmp_path / "out")


def test_another_type_of_numbers(tmp_path, capsys, parts):
    """Eight-bit weights: said as it is, not called a damaged file."""
    file = tmp_path / "llm/model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(weights, file, metadata={"format": "pt"})
    error = fails(capsys, "hf-to-mcore", *parts, tmp_path / "out")
    assert "model.norm.weight is F8_E4M3" in error and "bfloat16" in error
