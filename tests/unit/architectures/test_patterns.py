"""Patterns over names of parameters, and the names that a tensor has."""

import pytest

from dattn_mcore.architectures.patterns import (
    compile_pattern,
    exported_names,
    key_and_layer,
    matched_parts,
    names_of,
)
from dattn_mcore.architectures.sizes import ModelConfig
from dattn_mcore.architectures.tables import model_table
from dattn_mcore.errors import ConfigError

ENTRIES = {entry.key: entry for entry in model_table(ModelConfig())}
KV = ENTRIES["decoder.layers.self_attention.linear_kv.weight"]


@pytest.mark.parametrize(
    ("pattern", "matched", "not_matched"),
    [
        ("vision", ["vision", "vision.a.b"], ["visions.a", "a.vision", ""]),
        ("vision.layers.1", ["vision.layers.1.mlp"], ["vision.layers.12.mlp", "vision.layers"]),
        ("*", ["a", "a.b.c"], []),
        ("*.bias", ["a.bias", "a.b.bias", ".bias"], ["bias", "a.biases"]),
        ("a*c", ["ac", "abc", "a.b.c", "abc.d"], ["ab", "abcd"]),
        ("layers.?", ["layers.1.x", "layers.a"], ["layers.12", "layers."]),
        ("{a,bc}.x", ["a.x", "bc.x.y"], ["b.x", "ac.x"]),
        ("{q,k*}_proj", ["q_proj", "kv_proj"], ["v_proj"]),
        ("{a,ab}c", ["ac", "abc"], ["aabc"]),
        ("l.{13..25}", ["l.13.x", "l.25", "l.20"], ["l.12", "l.26", "l.130", "l.1", "l.x"]),
        ("l.{8..11}", ["l.8", "l.9", "l.10", "l.11"], ["l.12", "l.81", "l.1"]),
        ("l.{1..3}*", ["l.1", "l.2.x"], ["l.13", "l.30"]),  # a number is taken as a whole
        ("l.{0..1,7,10..11}.m", ["l.0.m", "l.7.m", "l.11.m"], ["l.2.m", "l.17.m"]),
        ("{v.{1..2},w}.x", ["v.1.x", "w.x"], ["v.3.x", "v.x"]),
        ("a.b(c)[d]^$", ["a.b(c)[d]^$"], ["a.bcd", "axb(c)[d]^$"]),  # nothing else is special
    ],
)
def test_what_a_pattern_matches(pattern, matched, not_matched):
    matches = compile_pattern(pattern)
    assert [name for name in matched if not matches(name)] == []
    assert [name for name in not_matched if matches(name)] == []


def test_a_pattern_of_many_stars_is_quick():
    assert not compile_pattern("*a" * 400 + "b")("a" * 1000)


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("", "is empty"),
        ("a" * 1001, "has over 1000 characters"),
        ("a b", "holds white space"),
        ("{a", "has a { without its }"),
        ("a}", "has a } without its {"),
        ("{a,}", "has an empty alternative"),
        ("{}", "has an empty alternative"),
        ("{5..3}", "has the empty range 5..3"),
        ("{a..c}", "has 'a..c', which is no range of whole numbers"),
        ("{1..}", "has '1..', which is no range of whole numbers"),
        ("{-1..3}", "has '-1..3', which is no range of whole numbers"),
        ("{" * 9 + "a" + "}" * 9, "has braces in braces in braces"),
    ],
)
def test_malformed_patterns_are_named(pattern, problem):
    with pytest.raises(ConfigError) as caught:
        compile_pattern(pattern, "optim.groups[0].patterns")
    assert str(caught.value).startswith("optim.groups[0].patterns=")
    assert f"is no pattern: it {problem}; use * for anything" in str(caught.value)


def test_a_tensor_has_its_own_and_its_exported_names():
    assert names_of(KV, 3) == (
        "decoder.layers.3.self_attention.linear_kv.weight",
        "llm.layers.3.self_attention.linear_kv.weight",
        "model.language_model.layers.3.self_attn.k_proj.weight",
        "language_model.layers.3.self_attn.k_proj.weight",
        "model.language_model.layers.3.self_attn.v_proj.weight",
        "language_model.layers.3.self_attn.v_proj.weight",
    )
    tower = ENTRIES["vision.decoder.layers.mlp.linear_fc2.bias"]
    assert names_of(tower, 1)[:2] == (
        "vision.decoder.layers.1.mlp.linear_fc2.bias",
        "vision.layers.1.mlp.linear_fc2.bias",
    )
    assert names_of(ENTRIES["projector.norm.weight"], None) == (
        "projector.norm.weight",
        "model.multi_modal_projector.norm.weight",
        "multi_modal_projector.norm.weight",
    )
    assert [len(names) for names in exported_names(KV, 0)] == [2, 2]


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("decoder.layers.3", (True, True)),
        ("llm.layers.{0..3}.self_attention.linear_kv", (True, True)),
        ("*k_proj*", (True, False)),
        ("language_model.layers.3.self_attn.v_proj", (False, True)),
        ("model.language_model.layers.3.self_attn.{k,v}_proj", (True, True)),
        ("decoder.layers.2", (False, False)),
    ],
)
def test_parts_of_a_fused_tensor(pattern, parts):
    assert matched_parts(compile_pattern(pattern), KV, 3) == parts


def test_every_part_is_one_pattern():
    for part in ("vision", "projector", "llm"):
        matches = compile_pattern(part)
        for entry in model_table(ModelConfig()):
            for layer in entry.steps():
                means = any(map(matches, names_of(entry, layer)))
                outside = ("vision.", "projector.")
                own = "llm" if not entry.key.startswith(outside) else entry.key.split(".")[0]
                assert means == (own == part)


@pytest.mark.parametrize(
    ("name", "first", "found"),
    [
        ("decoder.layers.1.mlp.linear_fc2.weight", 4, ("decoder.layers.mlp.linear_fc2.weight", 5)),
        ("vision.decoder.layers.1.mlp.x", 4, ("vision.decoder.layers.mlp.x", 1)),
        ("decoder.final_layernorm.weight", 4, ("decoder.final_layernorm.weight", None)),
        ("projector.mlp.linear_fc1.bias", 4, ("projector.mlp.linear_fc1.bias", None)),
    ],
)
def test_a_modules_name_becomes_a_key_and_a_layer(name, first, found):
    assert key_and_layer(name, first) == found
