"""The settings of adapters: what patterns resolve to, and one line for each mistake."""

from dataclasses import replace

import pytest

from dattn_mcore.architectures.adapters import adapted_linears, adapter_table, with_adapters
from dattn_mcore.architectures.parameters import in_order_of_modules
from dattn_mcore.architectures.tables import language_table
from dattn_mcore.config.checks import check_config
from dattn_mcore.config.load import from_dict
from dattn_mcore.config.lora import adapters_of
from dattn_mcore.config.optim_groups import learns
from dattn_mcore.config.schema import Config
from dattn_mcore.errors import ConfigError


def config_with(targets, **sections):
    """The embedded default (4 layers) with adapters."""
    lora = {"targets": targets, **sections.pop("lora", {})}
    tree = {"lora": lora, "checkpoint": {"init_from": "runs/base"}, **sections}
    return from_dict(tree)


@pytest.mark.parametrize(
    ("targets", "linears"),
    [
        (["*.q_proj"], {"self_attention.linear_q": (4, "lora")}),
        (["*.{k,v}_proj"], {"self_attention.linear_kv": (4, "lora")}),
        (["*.v_proj"], {"self_attention.linear_kv": (4, "lora_v_proj")}),
        (["model.language_model.layers.{1..2}"], {"mlp.linear_fc2": (2, "lora")}),
        (["llm.layers.3.mlp.linear_fc1"], {"mlp.linear_fc1": (1, "lora")}),
        (["*.layers.0.*.up_proj", "*.down_proj"], {"mlp.linear_fc1": (1, "lora_up_proj")}),
    ],
)
def test_patterns_name_linears(targets, linears):
    config = config_with(targets)
    check_config(config)
    found = adapted_linears(config.model, adapters_of(config))
    by_place = {linear.place: (len(linear.layers), linear.name) for linear in found}
    assert linears.items() <= by_place.items()


def test_one_fused_linear_may_have_other_parts_in_other_layers():
    config = config_with(["*.layers.{0..1}.*.k_proj", "*.layers.{1..3}.*.v_proj"])
    found = adapted_linears(config.model, adapters_of(config))
    assert [(linear.name, linear.layers) for linear in found] == [
        ("lora_k_proj", (0,)),
        ("lora", (1,)),
        ("lora_v_proj", (2, 3)),
    ]
    names = [name for e in adapter_table(config.model, adapters_of(config)) for name in e.names(0)]
    assert "base_model.model.model.language_model.layers.2.self_attn.v_proj.lora_B.weight" in names


def test_modules_stand_layer_by_layer():
    """Behind their own linear, in the layers that have them."""
    config = config_with(["*.layers.{1..2}.*.q_proj"])
    table = with_adapters(language_table(config.model), config.model, adapters_of(config))
    keys = [(e.key, layer) for e, layer in in_order_of_modules(table, [2, 3])]
    lora = [key for key in keys if ".lora." in key[0]]
    assert lora == [
        ("decoder.layers.self_attention.linear_q.lora.a", 0),
        ("decoder.layers.self_attention.linear_q.lora.b", 0),
    ]
    before = keys[keys.index(lora[0]) - 1]
    assert before == ("decoder.layers.self_attention.linear_q.weight", 0)


def test_what_learns():
    """Adapters alone of the language model, parts that train.trains names, and optim.groups."""
    groups = [{"patterns": ["llm.final_layernorm"], "trains": True}]
    train = {"trains": ["projector", "llm"]}
    config = config_with(["*.q_proj"], train=train, optim={"groups": groups})
    check_config(config)
    q = "decoder.layers.self_attention.linear_q."
    assert learns(config, f"{q}lora.a", 3) and not learns(config, f"{q}weight", 3)
    assert learns(config, "projector.mlp.linear_fc1.weight", None)
    assert not learns(config, "embedding.word_embeddings.weight", None)
    assert learns(config, "decoder.final_layernorm.weight", None)
    assert not learns(config, "vision.patch_embedding.weight", None)


def test_without_targets_nothing_changes():
    assert adapters_of(Config()) is None
    config = config_with(["*.q_proj"])
    off = replace(config, lora=replace(config.lora, targets=()))
    assert adapters_of(off) is None


FROZEN = {"optim": {"groups": [{"patterns": ["llm.layers.{0..1}"], "trains": False}]}}
WHOLE = {"optim": {"groups": [{"patterns": ["language_model"], "trains": False}]}}


@pytest.mark.parametrize(
    ("targets", "sections", "message"),
    [
        (["*.x_proj"], {}, "lora.targets='\\*.x_proj' matches no parameter of this model; ad"),
        (["vision"], {}, "matches model.vision_tower.*, which can have no adapter; adapters stand"),
        (["*.q_proj", "*norm.weight"], {}, "norm.weight' matches .*, which can have no adapter"),
        (["*.{q_proj"], {}, "lora.targets='\\*.{q_proj' is no pattern"),
        (["*.q_proj"], {"lora": {"rank": 0}}, "lora.rank=0 must be at least 1"),
        (["*.q_proj"], {"lora": {"rank": 4096}}, "lora.rank=4096 is larger than q_proj allows"),
        (["*.q_proj"], {"lora": {"alpha": 0.0}}, "lora.alpha=0.0 must be greater than 0"),
        (["*.q_proj"], {"lora": {"dropout": 1.0}}, "lora.dropout=1.0 must be at least 0 and less"),
        (["*.q_proj"], {"train": {"trains": ["projector"]}}, "freezes as a whole; add llm to"),
        (["*.q_proj"], FROZEN, "optim.groups.0. freezes 4 of 8 tensors of adapters"),
        (["*.q_proj"], WHOLE, "optim.groups.0. freezes every linear that lora.targets gives an ad"),
        (["*.q_proj"], {"checkpoint": {}}, "lora.targets needs checkpoint.init_from"),
        ([], {"lora": {"init_from": "x"}}, "lora.init_from=x needs lora.targets"),
        (
            ["*.q_proj"],
            {"lora": {"dropout": 0.1}, "train": {"recompute_visual_chunk": 64}},
            "lora.dropout=0.1 cannot go with train.recompute_visual_chunk=64",
        ),
    ],
)
def test_a_mistake_is_one_line(targets, sections, message):
    with pytest.raises(ConfigError, match=message) as error:
        check_config(config_with(targets, **sections))
    assert len(error.value.mistakes) == 1


def test_half_of_a_shared_group_is_refused():
    """A rank that holds keys alone would have no row of the values' adapter."""
    llm = {"num_query_groups": 2}
    sections = {"model": {"llm": llm}, "parallel": {"tp": 4}}
    with pytest.raises(ConfigError, match="lora.targets has v_proj without the other of keys and"):
        check_config(config_with(["*.v_proj"], **sections))
    check_config(config_with(["*.{k,v}_proj"], **sections))


def test_a_tensor_of_the_base_learns_in_all_layers_or_in_none():
    """What a checkpoint of adapters holds of the base are whole stacks of layers."""
    tree = {
        "lora": {"targets": ["*.q_proj"]},
        "checkpoint": {"init_from": "runs/base"},
        "optim": {"groups": [{"patterns": "*.input_layernorm", "trains": True}]},
    }
    check_config(from_dict(tree))
    tree["optim"]["groups"][0]["patterns"] = "*.layers.1.input_layernorm"
    with pytest.raises(ConfigError, match="must learn in all layers or in none"):
        check_config(from_dict(tree))
