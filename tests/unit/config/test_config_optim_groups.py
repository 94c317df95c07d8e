"""Settings of each tensor, from parts and from groups of patterns."""

import pytest

from dattn_mcore.config.checks import check_config
from dattn_mcore.config.load import from_dict, load_config
from dattn_mcore.config.optim_groups import learns, resolved, settings_of
from dattn_mcore.config.schema import Config
from dattn_mcore.errors import ConfigError

FC2 = "vision.decoder.layers.mlp.linear_fc2.weight"
KV = "decoder.layers.self_attention.linear_kv.weight"


def checked(*groups, trains=("vision", "projector", "llm"), **optim):
    config = from_dict(
        {
            "model": {"vision": {"num_layers": 4}},
            "optim": {"lr": 1.0, "weight_decay": 0.5, **optim, "groups": list(groups)},
            "train": {"trains": list(trains)},
        }
    )
    check_config(config)
    return config


def test_without_groups_a_part_decides():
    config = checked(trains=("projector", "llm"), lr_projector=2.0, min_lr_ratio=0.1)
    table = resolved(config)
    assert {key.split(".")[0] for (key, _), it in table.items() if not it.trains} == {"vision"}
    projector = settings_of(config, "projector.mlp.linear_fc1.weight", None)
    assert (projector.lr, projector.min_lr, projector.decays) == (2.0, 0.2, True)
    llm = settings_of(config, KV, 2)
    assert (llm.lr, llm.min_lr, llm.weight_decay, llm.group) == (1.0, 0.1, 0.5, None)
    assert (llm.beta1, llm.beta2) == (config.optim.beta1, config.optim.beta2)
    assert not settings_of(config, "projector.mlp.linear_fc1.bias", None).decays
    assert not settings_of(config, "decoder.final_layernorm.weight", None).decays


def test_the_upper_half_of_the_tower():
    config = checked({"patterns": "vision.layers.{2..3}", "trains": True}, trains=("llm",))
    assert [learns(config, FC2, layer) for layer in range(4)] == [False, False, True, True]
    assert not learns(config, "vision.patch_embedding.weight", None)
    assert learns(config, KV, 0)


def test_later_groups_win_over_earlier_ones_and_over_shorthands():
    config = checked(
        {"patterns": "vision", "lr": 3.0, "weight_decay": 0.0},
        {"patterns": ["vision.layers.1", "decoder.layers.{0,3}"], "lr": 4.0, "beta2": 0.5},
        {"patterns": "llm.layers.3", "trains": False},
        lr_vision=2.0,
        min_lr_ratio=0.5,
    )
    first, second = settings_of(config, FC2, 0), settings_of(config, FC2, 1)
    assert (first.lr, first.min_lr, first.weight_decay, first.group) == (3.0, 1.5, 0.0, 0)
    assert (second.lr, second.min_lr, second.weight_decay, second.group) == (4.0, 2.0, 0.0, 1)
    assert (second.beta1, second.beta2) == (config.optim.beta1, 0.5)
    assert settings_of(config, KV, 0).lr == 4.0
    assert settings_of(config, KV, 1).lr == 1.0
    assert not learns(config, KV, 3)


def test_the_towers_rate_decays_over_its_layers():
    config = checked(
        {"patterns": "vision.layers.1", "lr": 7.0}, lr_vision=8.0, vision_layer_decay=0.5
    )
    rates = [settings_of(config, FC2, layer).lr for layer in range(4)]
    assert rates == [1.0, 7.0, 4.0, 8.0]  # a group's own rate is that rate
    assert settings_of(config, "vision.patch_embedding.weight", None).lr == 0.5
    assert settings_of(config, "vision.position_embedding.weight", None).lr == 0.5
    assert settings_of(config, "projector.mlp.linear_fc1.weight", None).lr == 1.0


def test_the_output_layers_copy_of_a_tied_embedding_follows_it():
    tied = from_dict(
        {
            "model": {"llm": {"tie_embeddings": True}},
            "optim": {"groups": [{"patterns": "*embed_tokens.weight", "trains": False}]},
        }
    )
    assert not learns(tied, "output_layer.weight", None)
    apart = from_dict({"optim": {"groups": [{"patterns": "*embed_tokens.weight", "lr": 9.0}]}})
    assert settings_of(apart, "output_layer.weight", None).lr == apart.optim.lr


def test_exported_names_mean_whole_tensors():
    config = checked(
        {"patterns": "model.language_model.layers.0.self_attn.{k,v}_proj", "lr": 5.0},
        {"patterns": ["*layers.1.mlp.gate_proj*", "*layers.1.mlp.up_proj*"], "lr": 6.0},
    )
    assert [settings_of(config, KV, layer).lr for layer in (0, 1)] == [5.0, 1.0]
    fc1 = "decoder.layers.mlp.linear_fc1.weight"
    assert [settings_of(config, fc1, layer).lr for layer in (0, 1)] == [1.0, 6.0]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({}, r"optim.groups\[0\].patterns=\[\] must have at least one pattern of names"),
        ({"patterns": "vision"}, r"optim.groups\[0\] sets nothing; add one of trains, lr, weight"),
        ({"patterns": "a}", "lr": 1}, r"optim.groups\[0\].patterns='a}' is no pattern: it has a }"),
        (
            {"patterns": "vison.layers.{2..3}", "lr": 1},
            r"'vison.layers.{2..3}' matches no parameter of this model; did you mean 'vision.laye",
        ),
        ({"patterns": "vision.layers.{4..9}", "lr": 1}, "matches no parameter of this model"),
        (
            {"patterns": "*.layers.1.self_attn.k_proj.weight", "lr": 1},
            r"k_proj.weight and not .*v_proj.weight: here they are one tensor \(vision.decoder",
        ),
        (
            {"patterns": "language_model.layers.1.mlp.gate_proj", "lr": 1},
            r"layers.1.mlp.gate_proj.weight and not language_model.layers.1.mlp.up_proj.weight: ",
        ),
        ({"patterns": "llm", "lr": 0.0}, r"optim.groups\[0\].lr=0.0 must be greater than 0"),
        ({"patterns": "llm", "lr": -1.0}, r"optim.groups\[0\].lr=-1.0 must be greater than 0"),
        ({"patterns": "llm", "lr": float("nan")}, r"optim.groups\[0\].lr=nan must be a finite"),
        ({"patterns": "llm", "weight_decay": -1}, r"weight_decay=-1.0 must be at least 0"),
        ({"patterns": "llm", "beta1": 1}, r"beta1=1.0 must be at least 0 and less than 1"),
        ({"patterns": "llm", "beta2": -0.1}, r"beta2=-0.1 must be at least 0 and less than 1"),
        (
            {"patterns": "llm", "trains": False, "lr": 1},
            r"optim.groups\[0\] sets lr of parameters that are all frozen; add trains: true",
        ),
        ({"patterns": "*norm.weight", "weight_decay": 1}, "has no effect: norms and biases"),
        ({"patterns": "*", "trains": False}, r"nothing learns: train.trains=\[.*\] and optim.grou"),
        ({"patterns": 3, "lr": 1}, r"optim.groups\[0\].patterns=3 must be of type str"),
        ({"pattern": "llm"}, r"unknown configuration key 'optim.groups\[0\].pattern'; did you mea"),
    ],
)
def test_bad_groups(group, message):
    with pytest.raises(ConfigError, match=message):
        checked(group)


def test_bad_decay_over_layers():
    for value in (0.0, -1.0, 1.1):
        with pytest.raises(ConfigError, match=r"vision_layer_decay=.* must be greater than 0 and"):
            checked(vision_layer_decay=value)
    with pytest.raises(ConfigError, match="vision_layer_decay=0.5 has no effect while the tower"):
        checked(vision_layer_decay=0.5, trains=("llm",))
    assert checked({"patterns": "vision.layers.3", "trains": True}, trains=("llm",))


def test_all_mistakes_are_said_at_once():
    with pytest.raises(ConfigError) as caught:
        checked({"patterns": "x", "lr": 1}, {"patterns": "vision"}, {"patterns": "y", "lr": 1})
    assert len(caught.value.mistakes) == 3


def test_groups_alone_say_what_learns():
    config = checked({"patterns": "projector", "trains": True}, trains=())
    assert {key.split(".")[0] for (key, _), it in resolved(config).items() if it.trains} == {
        "projector"
    }
    with pytest.raises(ConfigError, match=r"train.trains=\[\] must name one or more of vision"):
        checked(trains=())


def test_unknown_names_of_architectures_are_refused_as_such():
    tree = {"model": {"family": "x"}, "optim": {"groups": [{"patterns": "a", "lr": 1}]}}
    with pytest.raises(ConfigError) as caught:
        check_config(from_dict(tree))
    assert "optim.groups" not in str(caught.value)


def test_groups_on_the_command_line():
    config = load_config(None, ['optim.groups=[{patterns: "vision.*", trains: false}]'])
    assert config.optim.groups[0].patterns == ("vision.*",)
    assert Config().optim.groups == ()
