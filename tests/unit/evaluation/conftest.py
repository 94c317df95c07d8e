"""Shared by the tests of the evaluation: released answers, small trees, a small random model."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def released():
    """LLaVA-1.5-13B's released answers and question files."""
    named = os.environ.get("DATTN_LLAVA_EVAL")
    folder = Path(named) if named else ROOT.parent / "shared/fixtures/llava_eval"
    if not folder.is_dir():
        pytest.skip(f"no released LLaVA answers in {folder}; name them with DATTN_LLAVA_EVAL")
    return folder


@pytest.fixture
def tree(tmp_path):
    """A data tree of all twelve benchmarks, to be changed by the test."""
    from tests.unit.evaluation.trees import make_tree

    return make_tree(tmp_path / "val")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """An exported random model that answers in ASCII, and its data tree."""
    from tests.unit.convert.convert_helpers import make_checkpoint, make_tokenizer, small_config
    from tests.unit.evaluation.trees import make_tree
    from tools.checkpoint_convert import mcore_to_hf

    folder = tmp_path_factory.mktemp("evaluation")
    make_checkpoint(folder / "mcore", small_config(make_tokenizer(folder)))
    mcore_to_hf.convert(folder / "mcore", folder / "tiny")
    sharpen(folder / "tiny")
    only_ascii(folder / "tiny")
    make_tree(folder / "val")
    return folder


@pytest.fixture(scope="session")
def whole(tiny_model):
    """The folder of an undisturbed run over everything, in this process; only to be read."""
    from tests.unit.evaluation.tiny_runs import run

    out = tiny_model / "whole"
    assert run(tiny_model, out, "--batch-size=8") == 0
    return out


def sharpen(model: Path) -> None:
    """Larger random weights: answers that depend on the image and on every word."""
    from transformers import AutoModelForImageTextToText

    import dattn_mcore.hf
    from tests.unit.hf.hf_models import randomize

    dattn_mcore.hf.register()
    loaded = AutoModelForImageTextToText.from_pretrained(str(model), trust_remote_code=False)
    randomize(loaded, seed=1)
    loaded.save_pretrained(str(model))


def only_ascii(model: Path) -> None:
    """Forbids tokens that are no whole characters, so that different answers look different."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
    vocabulary = json.loads((model / "config.json").read_text())["text_config"]["vocab_size"]
    special = set(tokenizer.all_special_ids) - {tokenizer.eos_token_id}
    bad = [
        token
        for token in range(vocabulary)
        if token in special
        or not tokenizer.decode([token]).strip().isascii()
        or (not tokenizer.decode([token]).strip() and token != tokenizer.eos_token_id)
    ]
    path = model / "generation_config.json"
    config = json.loads(path.read_text())
    config["suppress_tokens"] = sorted({*config.get("suppress_tokens", []), *bad})
    path.write_text(json.dumps(config))
