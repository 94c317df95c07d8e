"""`verify`: equal sides say so, every kind of difference is listed, and the exit status tells."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dattn_mcore.architectures.tables import model_table
from dattn_mcore.config.load import to_yaml
from tests.unit.convert.convert_helpers import (
    make_tokenizer,
    plan,
    random_tensors,
    small_config,
)
from tests.unit.convert.raw_models import make_llm, make_tower, raw_config
from tools.checkpoint_convert import logits as logits_module
from tools.checkpoint_convert.__main__ import main
from tools.checkpoint_convert.dist_checkpoint import write_checkpoint


def run(capsys, *arguments):
    """Exit status and lines of one `verify`."""
    status = main(["verify", *(str(a) for a in arguments)])
    return status, capsys.readouterr().out.strip().splitlines()


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Raw folders, the checkpoint made from them, its export, and the configuration."""
    folder = tmp_path_factory.mktemp("sides")
    config = raw_config("gemma2", "siglip")
    data = replace(config.data, tokenizer=str(make_tokenizer(folder)), template="plain")
    config = replace(config, data=data)
    make_llm(folder / "llm", config)
    make_tower(folder / "vision", config)
    (folder / "run.yaml").write_text(to_yaml(config))
    parts = [
        "--llm",
        str(folder / "llm"),
        "--vision",
        str(folder / "vision"),
        "--config",
        str(folder / "run.yaml"),
    ]
    assert main(["hf-to-mcore", *parts, str(folder / "mcore")]) == 0
    assert main(["mcore-to-hf", "--no-check", str(folder / "mcore"), str(folder / "hf")]) == 0
    return folder


@pytest.mark.parametrize(
    ("first", "second", "logits"),
    [
        ("mcore", "hf", True),
        ("hf", "mcore", True),
        ("mcore", "mcore", True),
        ("llm", "mcore", False),
        ("hf", "llm", False),
        ("vision", "mcore", False),
        ("hf", "vision", False),
        ("vision", "vision", False),
    ],
)
def test_equal_sides(sides, capsys, first, second, logits):
    status, lines = run(capsys, sides / first, sides / second)
    assert status == 0 and len(lines) == 1
    assert lines[0].startswith("equal to the last bit: ")
    assert ("logits" in lines[0]) == logits


def test_inspect_shows_parts(sides, capsys):
    """A language model's and a tower's own folder, with what is left out by rule."""
    assert main(["inspect", str(sides / "llm")]) == 0
    out = capsys.readouterr().out
    assert "Gemma 2 (gemma2), 3 layers of 32" in out and "vision tower" not in out
    assert main(["inspect", str(sides / "vision"), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "SigLIP (siglip), 3 layers, 28px" in out and "language model" not in out
    assert "model.vision_tower.post_layernorm.weight" in out


def test_nothing_in_common(sides, capsys):
    assert main(["verify", str(sides / "llm"), str(sides / "vision")]) == 2
    assert "nothing to compare" in capsys.readouterr().err


def copy_export(sides, to, change):
    """A copy of the export with other tensors."""
    to.mkdir()
    for file in (sides / "hf").iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_every_difference_is_listed(sides, tmp_path, capsys):
    text = "model.language_model."

    def change(tensors):
        tensors.pop(text + "norm.weight")
        tensors["stranger"] = torch.ones(2)
        tensors[text + "layers.0.input_layernorm.weight"] = torch.ones(31)
        name = text + "layers.1.input_layernorm.weight"
        tensors[name] = tensors[name].bfloat16()
        tensors[text + "layers.2.self_attn.k_proj.weight"][3, 4] += 0.5
        zero = tensors["model.multi_modal_projector.linear_1.bias"]
        zero[0] = -zero[0]  # 0 and -0 are not the same bits

    other = copy_export(sides, tmp_path / "other", change)
    for pair in ((sides / "mcore", other), (other, sides / "mcore"), (sides / "hf", other)):
        status, lines = run(capsys, *pair)
        assert status == 1
        found = "\n".join(lines)
        assert f"{text}norm.weight is missing in {other}" in found
        assert "stranger is missing in" in found
        assert f"{text}layers.0.input_layernorm.weight: shapes [" in found
        assert f"{text}layers.1.input_layernorm.weight: dtypes " in found
        assert "k_proj.weight: 1 of 512 values differ, the largest difference is 0.5" in found
        assert "linear_1.bias: 1 of 40 values differ, the largest difference is 0" in found
        assert lines[-1].startswith("6 differences")


def test_settings_count_as_well(sides, tmp_path, capsys):
    """The same bits under another soft-cap are another model."""
    config = raw_config("gemma2", "siglip", attention_softcap=4.0)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    make_llm(tmp_path / "llm", config)
    assert run(capsys, sides / "llm", tmp_path / "llm") == (
        1,
        [
            "model.llm.attention_softcap: 2.0 and 4.0",
            run_line(capsys, sides),
        ],
    )


def run_line(capsys, sides):
    _, (line,) = run(capsys, sides / "llm", sides / "llm")
    return line.replace("equal to the last bit: ", "1 differences; compared: ")


def test_two_checkpoints(tmp_path, capsys):
    """Padding of the vocabulary is no content; all else is."""
    config = small_config(make_tokenizer(tmp_path))
    table = model_table(config.model)
    tensors = random_tensors(table)
    write_checkpoint(tmp_path / "step_1", plan(table, tensors), config)
    tensors["embedding.word_embeddings.weight", None] = tensors[
        "embedding.word_embeddings.weight", None
    ].clone()
    tensors["embedding.word_embeddings.weight", None][340] += 1
    write_checkpoint(tmp_path / "step_2", plan(table, tensors), config)
    assert run(capsys, tmp_path / "step_1", tmp_path / "step_2")[0] == 0
    tensors["embedding.word_embeddings.weight", None][329] += 1
    write_checkpoint(tmp_path / "step_3", plan(table, tensors), config)
    status, lines = run(capsys, tmp_path / "step_1", tmp_path / "step_3")
    assert status == 1 and "embed_tokens.weight: 32 of 10560" in lines[0]


def test_logits_that_differ_are_a_difference(sides, capsys, monkeypatch):
    """What bits cannot see: one side computes something else."""
    original = logits_module.fixed_logits
    monkeypatch.setattr(
        logits_module,
        "fixed_logits",
        lambda path, avoid: original(path, avoid) + (1e-3 if path.name == "hf" else 0),
    )
    status, lines = run(capsys, sides / "hf", sides / "mcore")
    assert status == 1 and lines[0].startswith("logits on a fixed input differ by 0.001")
