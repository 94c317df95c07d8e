"""What the dry run says about parameters that learn, and about the learning rate."""

from dattn_mcore.config.checks import check_config
from dattn_mcore.config.load import from_dict
from dattn_mcore.plan.learning import learning_lines
from dattn_mcore.plan.parameters import stage_parameters
from dattn_mcore.training.dry_run import describe

GROUPS = [
    {"patterns": "vision.layers.{2..3}", "trains": True, "beta2": 0.5},
    {"patterns": ["*norm*", "embedding"], "trains": False},
    {"patterns": "llm.layers.1", "lr": 7e-4, "weight_decay": 0.25},
]


def config_of(**optim):
    config = from_dict(
        {
            "model": {"vision": {"num_layers": 4}},
            "optim": {"lr": 1e-3, "weight_decay": 0.1, **optim},
            "train": {"trains": ["projector", "llm"]},
        }
    )
    check_config(config)
    return config


def rows_of(config):
    """Columns of each line, by what it is about and whether it learns."""
    lines = [line.split("  ") for line in learning_lines(config)]
    columns = [[column.strip() for column in line if column.strip()] for line in lines]
    return {(name, rest[1:2] != ["frozen"]): rest for name, *rest in columns[1:]}


def test_parts_without_groups():
    rows = rows_of(config_of(lr_projector=2e-3))
    assert rows["projector", True][1:] == ["0.002", "0.1", "0.9, 0.95"]
    assert rows["llm", True][1:] == ["0.001", "0.1", "0.9, 0.95"]
    assert rows["vision", False][1:] == ["frozen"]


def test_groups_with_counts():
    config = config_of(groups=GROUPS, vision_layer_decay=0.5)
    rows = rows_of(config)
    upper = rows["optim.groups[0] (vision.layers.{2..3})", True]
    assert upper[1:] == ["0.0005 to 0.001", "0.1", "0.9, 0.5"]
    assert rows["optim.groups[1] (*norm*, embedding)", False][1:] == ["frozen"]
    own = rows["optim.groups[2] (llm.layers.1)", True]
    assert own[1:] == ["0.0007", "0.25", "0.9, 0.95"]
    # The norms of that layer are in the last group that matches them, and stay frozen.
    assert rows["optim.groups[2] (llm.layers.1)", False][1:] == ["frozen"]
    (chunk,) = stage_parameters(config, 0)
    for learns in (True, False):
        counted = sum(int(row[0].replace(",", "")) for key, row in rows.items() if key[1] is learns)
        assert counted == sum(p.numel for p in chunk if p.trained is learns)


def test_adapters_have_a_line():
    lora = {"targets": ["*.{q,down}_proj"], "rank": 2}
    config = from_dict(
        {
            "lora": lora,
            "train": {"trains": ["projector", "llm"]},
            "optim": {"lr": 1e-3, "groups": [{"patterns": "*.down_proj.lora_B", "lr": 2e-3}]},
            "checkpoint": {"init_from": "base"},
        }
    )
    check_config(config)
    rows, llm = rows_of(config), config.model.llm
    head = llm.hidden_size // llm.num_attention_heads
    queries = 2 * (llm.hidden_size + llm.num_attention_heads * head)
    counted = [
        llm.num_layers * one for one in (queries + 2 * llm.ffn_hidden_size, 2 * llm.hidden_size)
    ]
    assert rows["adapters", True][:2] == [f"{counted[0]:,}", "0.001"]
    assert rows["optim.groups[0] (*.down_proj.lora_B)", True][:2] == [f"{counted[1]:,}", "0.002"]
    assert rows["llm", False][1:] == ["frozen"]


def test_the_dry_run_shows_them_and_the_schedule():
    groups = [{"patterns": "llm.layers.1", "lr": 7e-4}]
    text = describe(config_of(groups=groups, schedule="wsd", decay_steps=100), 1)
    assert "optim.groups[0] (llm.layers.1)" in text
    assert (
        "learning rate: warm-up over 15 of 300 steps, then wsd, at the peak to step 200, then "
        "exponential decay; of optim.lr=0.001: 6.67e-05 in step 1, "
    ) in text
    text = describe(from_dict({"train": {"steps": None}}), 1)
    assert "learning rate: cosine; warm-up and decay once the run's steps are known" in text
