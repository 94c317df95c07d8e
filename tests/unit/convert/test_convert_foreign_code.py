"""Python code that a folder brings is never run, and nobody is asked whether it may."""

import ast
import json
from pathlib import Path

import pytest

from tests.unit.convert.convert_helpers import make_checkpoint, make_tokenizer, small_config
from tools.checkpoint_convert.__main__ import main
from tools.checkpoint_convert.tokenizers_out import from_sentencepiece

ROOT = Path(__file__).resolve().parents[3]


def bring_code(folder, marker):
    """A tokenizer and a configuration that only code of the folder can read."""
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    (folder / "foreign.py").write_text(code + "class Foreign:\n    pass\n")
    settings = {
        "tokenizer_class": "Foreign",
        "auto_map": {"AutoTokenizer": ["foreign.Foreign"] * 2},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.Foreign"}}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("given", [True, False])
def test_a_tokenizer_that_brings_code(tmp_path, capsys, monkeypatch, given):
    """By --tokenizer or by the run's configuration: one line, though the user would say yes."""
    asked, marker, folder = [], tmp_path / "ran", tmp_path / "tok"
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    from_sentencepiece(make_tokenizer(tmp_path)).save_pretrained(folder)
    bring_code(folder, marker)
    chosen = ["--tokenizer", str(folder)] if given else []
    make_checkpoint(tmp_path / "a", small_config(tmp_path / "other" if given else folder))
    capsys.readouterr()
    assert main(["mcore-to-hf", str(tmp_path / "a"), str(tmp_path / "hf"), *chosen]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert printed.out == "" and line.startswith("error: ") and f"'{folder}'" in line
    assert "such code is never run; give a" in line
    assert "trust_remote_code" not in line
    assert asked == [] and not marker.exists() and not (tmp_path / "hf").exists()


def test_code_that_is_not_needed_is_not_run(tmp_path, monkeypatch):
    """A folder whose configuration alone brings code still gives its tokenizer."""
    asked, marker, folder = [], tmp_path / "ran", tmp_path / "tok"
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    from_sentencepiece(make_tokenizer(tmp_path)).save_pretrained(folder)
    settings = (folder / "tokenizer_config.json").read_bytes()
    bring_code(folder, marker)
    (folder / "tokenizer_config.json").write_bytes(settings)
    make_checkpoint(tmp_path / "a", small_config(folder))
    assert main(["mcore-to-hf", "--no-check", str(tmp_path / "a"), str(tmp_path / "hf")]) == 0
    assert asked == [] and not marker.exists()


def test_no_folder_is_read_with_the_question_left_open():
    """Every from_pretrained of the trainer and the tools says trust_remote_code=False.

    But the check of an export: it runs the code that this package has just written into it. And
    `peft`, which reads a JSON file and safetensors beside a model that is there already.
    """
    files = [
        file
        for top in ("dattn_mcore", "tools", "benchmarks")
        for file in sorted((ROOT / top).rglob("*.py"))
        if ROOT / "dattn_mcore/hf" not in file.parents  # that is code which an export brings
    ]
    open_calls, own_calls, calls = [], [], 0
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
                if ast.unparse(node.func) == "peft.PeftModel.from_pretrained":
                    continue
                calls += 1
                if any(ast.unparse(keyword.value) == "OWN_CODE" for keyword in node.keywords):
                    own_calls.append(file.name)
                elif not any(closed(keyword) for keyword in node.keywords):
                    open_calls.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert open_calls == [] and calls >= 5
    assert own_calls == ["export_check.py"] * 2  # processor and model


def closed(keyword):
    if keyword.arg is None:  # **settings
        return ast.unparse(keyword.value) == "NO_FOREIGN_CODE"
    return keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) == "False"
