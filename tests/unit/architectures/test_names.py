"""A family's and a tower's name stands in `dattn_mcore/architectures` alone."""

import ast
import re
from pathlib import Path

import pytest

from dattn_mcore.architectures import language_models, vision_towers

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = ("dattn_mcore", "tools")
# Of transformers' modules and people's words, beside `name` and `model_type` of the records.
OTHERS = {"llama", "gemma", "qwen", "clip_vision_model", "siglip2"}
# The optimizer's clipping, columns of image sets, a kind of rotary positions, a scale of queries,
# forms of records by who writes them.
OTHER_MEANINGS = (
    "clip_grad",
    "clip_b32_",
    "clip_l14_",
    "llama3",
    "llama_4_scaling_beta",
    "llama_factory",
    "LLAMA_FACTORY",
    "as Qwen-VL does",
)


def names():
    """Every name of an architecture, in small letters."""
    records = [*language_models().values(), *vision_towers().values()]
    found = {text for record in records for text in (record.name, record.model_type)}
    return found | OTHERS


def mentions(text: str) -> list[str]:
    """Identifiers and texts of a program, docstrings aside, that name an architecture."""
    tree = ast.parse(text)
    documented = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    words = "|".join(sorted(names(), key=len, reverse=True))
    pattern = re.compile(rf"(?<![a-z])(?i:{words})(?![a-z])")
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            said = "" if id(node) in documented else node.value
        elif isinstance(node, ast.Name):
            said = node.id
        elif isinstance(node, ast.Attribute):
            said = node.attr
        elif isinstance(node, ast.alias):
            said = node.name
        else:
            continue
        # `clip` is a verb, too: as a name of its own it is not a tower's.
        if isinstance(node, ast.Name | ast.Attribute) and said == "clip":
            continue
        for other in OTHER_MEANINGS:
            said = said.replace(other, "")
        if pattern.search(said):
            found.append(said)
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_family_is_named_elsewhere(folder):
    found = {
        f"{path.relative_to(ROOT)}: {said}"
        for path in (ROOT / folder).rglob("*.py")
        if "architectures" not in path.parts
        for said in mentions(path.read_text(encoding="utf-8"))
    }
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        'if family == "gemma2": pass',
        "from transformers import CLIPVisionModel",
        "is_mistral = True",
        'TYPES = ("siglip_vision_model",)',
        "config.llama_style = 1",
    ],
)
def test_a_name_is_found(text):
    assert mentions(text)


def test_other_words_are_not():
    assert not mentions('"""As Gemma 2 does."""\nx = np.clip(a, 0, 1)\noptim.clip_grad = 1.0')
