"""Settings whose value is one of a few words: the words stand in the annotations alone."""

import dataclasses
import re
import typing

import pytest

from dattn_mcore.architectures import language_models
from dattn_mcore.architectures.activations import ACTIVATIONS
from dattn_mcore.config.hints import all_keys
from dattn_mcore.config.load import load_config
from dattn_mcore.config.schema import Config
from dattn_mcore.config.words import unknown_words, words_of
from dattn_mcore.data.images import BACKENDS as IMAGE_BACKENDS
from dattn_mcore.data.tiles import POLICIES
from dattn_mcore.errors import ConfigError
from dattn_mcore.layers.attention import BACKENDS


def kind_of(name):
    """The annotation of a setting, by its dotted name."""
    kind = Config
    for part in re.sub(r"\[\d+\]", "", name).split("."):
        if typing.get_origin(kind) is tuple:
            kind = typing.get_args(kind)[0]
        kind = typing.get_type_hints(kind)[part]
    return kind


SETTINGS = [name for name in all_keys(Config) if words_of(name, kind_of(name))]


def mistakes(name, word):
    """What is said of a word in a setting, which may be one of a list."""
    section, _, key = name.partition("[0].")
    value = f"[{word}]" if typing.get_origin(kind_of(name)) is tuple else word
    override = f"{section}=[{{{key}: {value}}}]" if key else f"{name}={value}"
    return list(unknown_words(load_config(None, [override])))


def test_all_settings_with_words_are_found():
    assert len(SETTINGS) >= 24
    of_lists = {"train.trains", "train.recompute_modules", "model.llm.layer_pattern"}
    assert of_lists | {"data.sources[0].format", "model.family", "train.fp8"} <= {*SETTINGS}
    assert words_of("train.fp8", kind_of("train.fp8")) == (
        "none",
        "delayed",
        "tensorwise",
        "blockwise",
    )
    assert words_of("model.family", str) == tuple(language_models())
    assert words_of("train.steps", kind_of("train.steps")) == ()


@pytest.mark.parametrize("name", SETTINGS)
def test_each_has_its_words_and_no_other(name):
    words = words_of(name, kind_of(name))
    for word in words:
        assert mistakes(name, word) == []
    (line,) = mistakes(name, "zzz")
    assert re.fullmatch(rf"{re.escape(name)}(\[0\])?='zzz' is unknown; use one of .*", line)
    assert line.endswith(f"use one of {', '.join(words)}")


def test_the_words_are_those_that_the_program_knows():
    backend = words_of("attention.backend", kind_of("attention.backend"))
    assert backend[0] == "auto" and {*backend[1:]} == {*BACKENDS}
    assert words_of("data.image_policy", kind_of("data.image_policy")) == POLICIES
    assert words_of("data.image_backend", kind_of("data.image_backend")) == IMAGE_BACKENDS
    activations = words_of("model.vision.activation", kind_of("model.vision.activation"))
    assert {*activations} == {*ACTIVATIONS}


@pytest.mark.parametrize(
    ("name", "word", "hint"),
    [
        ("attention.v2v", "causl", "; did you mean causal?"),
        ("train.device", "GPU", "; did you mean gpu?"),
        ("train.trains", "projektor", "; did you mean projector?"),
        ("data.sources[0].format", "parket", "; did you mean parquet?"),
        ("model.family", "qwen-3", "; did you mean qwen3?"),
        ("train.stage", "x" * 5000, "use one of align, pretrain, instruct"),
    ],
    ids=lambda value: value[:20],
)
def test_the_nearest_word_is_named(name, word, hint):
    (line,) = mistakes(name, word)
    assert line.endswith(hint) and len(line) < 300


def test_a_word_that_is_no_text_is_of_the_wrong_type():
    with pytest.raises(ConfigError, match="attention.v2v=3 must be of type str"):
        load_config(None, ["attention.v2v=3"])
    with pytest.raises(ConfigError, match="train.trains=3 must be of type str"):
        load_config(None, ["train.trains=[llm, 3]"])


def test_a_configuration_made_by_a_program_is_checked_as_well():
    config = load_config(None)
    wrong = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="fp16"))
    assert list(unknown_words(wrong)) == [
        "train.precision='fp16' is unknown; use one of fp32, bf16; did you mean bf16?"
    ]
