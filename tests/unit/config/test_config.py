"""Configuration: loading, overriding, and one clear line for every mistake."""

import dataclasses

import pytest

from dattn_mcore.architectures import language_models
from dattn_mcore.architectures.features import LayerNorms
from dattn_mcore.architectures.records import HELD_BY_ALL
from dattn_mcore.config.checks import check_config, data_parallel_size
from dattn_mcore.config.load import from_dict, load_config, to_dict, to_yaml
from dattn_mcore.config.schema import Config, LlmConfig
from dattn_mcore.errors import ConfigError, error_lines
from dattn_mcore.training.main import parse_arguments


def checked(*overrides):
    config = load_config(None, overrides)
    check_config(config)
    return config


def test_defaults_are_valid_for_tp4_pp2():
    config = checked("parallel.tp=4", "parallel.pp=2")
    assert data_parallel_size(config, 8) == 1
    assert data_parallel_size(config, 16) == 2


def test_round_trip_through_yaml(tmp_path):
    config = checked("optim.lr=3e-4", "train.trains=[projector]", "model.llm.sliding_window=7")
    assert from_dict(to_dict(config)) == config
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config


def test_base_files_and_overrides(tmp_path):
    (tmp_path / "base.yaml").write_text("optim: {lr: 1e-3, beta1: 0.8}\ntrain: {steps: 7}\n")
    (tmp_path / "run.yaml").write_text("base: base.yaml\noptim: {lr: 2e-3}\n")
    config = load_config(tmp_path / "run.yaml", ["train.steps=9"])
    assert (config.optim.lr, config.optim.beta1, config.train.steps) == (2e-3, 0.8, 9)


def test_several_bases(tmp_path):
    """Later ones win over earlier ones, the file itself over all; a common base may stand twice."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/root.yaml").write_text("optim: {lr: 1.0, beta1: 0.1, beta2: 0.1}\n")
    (tmp_path / "parts/a.yaml").write_text("base: root.yaml\noptim: {beta1: 0.2, beta2: 0.2}\n")
    (tmp_path / "parts/b.yaml").write_text("train: {steps: 7}\noptim: {beta2: 0.3}\n")
    (tmp_path / "run.yaml").write_text("base: [parts/a.yaml, parts/b.yaml]\noptim: {lr: 2.0}\n")
    config = load_config(tmp_path / "run.yaml")
    assert (config.optim.lr, config.optim.beta1, config.optim.beta2) == (2.0, 0.2, 0.3)
    assert config.train.steps == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: [a.yaml, 3]", "base: 3 is no file"),
        ("base: {a: b}", "is no file"),
        ("base: [gone.yaml]", "gone.yaml cannot be read"),
        ("base: [a.yaml, run.yaml]", "leads back to the file itself"),
    ],
)
def test_bad_bases(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text("train: {steps: 7}\n")
    (tmp_path / "run.yaml").write_text(text + "\n")
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "run.yaml")


def test_numbers_in_any_notation():
    config = load_config(None, ["optim.lr=1e-3", "optim.clip_grad=1", "train.trains=llm"])
    assert (config.optim.lr, config.optim.clip_grad) == (1e-3, 1.0)
    assert config.train.trains == ("llm",)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.seed = 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optim.weightdecay=1",
            r"unknown .* 'optim.weightdecay'; did you mean 'optim.weight_decay'",
        ),
        ("paralel.tp=2", "unknown configuration key 'paralel.tp'; did you mean 'parallel.tp'"),
        ("attn.v2v=causal", "unknown configuration key 'attn.v2v'; did you mean 'attention.v2v'"),
        ("optim.steps=3", "did you mean 'train.steps'"),
        ("log.comet=true", "'log.comet'; metrics go to metrics.jsonl, TensorBoard, Weights & Bias"),
        ("train.val_interval=9", "'train.val_interval'; the held-out loss has settings in valid"),
        ("val_interval=9", "'val_interval=9' is not understood; the held-out loss has settings"),
        ("log.folder=x", "'log.folder'; log has run_dir, interval, run_name, project, tensorboard"),
        ("log.intervall=x", "'log.intervall'; did you mean 'log.interval'"),
        ("train.grad_clip=1", "did you mean 'optim.clip_grad'"),
        ("modell.llm.num_layer=3", "did you mean 'model.llm.num_layers'"),
        ("data.sources=[{annotation: x}]", "'data.sources.0..annotation'; did you mean 'data.sour"),
        ("data.sources=[{}, {zzz: x}]", "'data.sources.1..zzz'; data.sources.0. has annotations"),
        ("dattn.zzz=x", "'dattn.zzz'; the sections are model, attention, parallel, data, optim"),
        ("lr=1", "write section.key=value, optim.lr=1$"),
        ("tp=2", r"'tp=2' is not understood; write .*, parallel.tp=2 or --tp 2$"),
        ("learning", "write section.key=value, for example optim.lr=1e-4$"),
        ("num_layers=2", "model.llm.num_layers=2 or model.vision.num_layers=2$"),
        ("train.epochs=2", "has no effect while train.steps=300 is set; add train.steps=null"),
        ("optim.lr=fast", "optim.lr='fast' must be of type float"),
        ("train.seed=1.5", "train.seed=1.5 must be of type int"),
        ("parallel.sp=1", "parallel.sp=1 must be of type bool"),
        ("model.llm=3", "model.llm=3 must be a section"),
        ("data.image_mean=[1, 2]", "must have 3 values"),
        ("data.template=[", "not valid YAML"),
        ("parallel.tp=3", r"num_query_groups=4, .* must be multiples of parallel.tp=3"),
        ("parallel.pp=3", r"num_layers=4 must be a multiple of pp \(3\) x vpp \(1\)"),
        ("parallel.vpp=2", "needs --pp of at least 2"),
        ("parallel.sp=true", "needs --tp of at least 2"),
        ("parallel.tp=0", "parallel.tp=0 must be greater than 0"),
        ("model.llm.num_attention_heads=6", "must be a multiple of model.llm.num_query_groups=4"),
        ("model.llm.head_dim=7", "must be even"),
        ("model.vision.select_layer=0", "must lie between"),
        ("model.vision.select_layer=-3", "must be -1 .all layers. or -2"),
        ("parallel.first_stage_layers=2", "parallel.first_stage_layers=2 needs --pp of at least 2"),
        ("optim.lr=.inf", "optim.lr=inf must be a finite number"),
        ("optim.lr=.nan", "optim.lr=nan must be a finite number"),
        ("optim.lr=nan", "optim.lr=nan must be a finite number"),
        ("optim.lr=1" + "0" * 400, "must be of type float"),
        ("optim.beta2=1.5", "optim.beta2=1.5 must be at least 0 and less than 1"),
        ("optim.beta1=1", "optim.beta1=1.0 must be at least 0 and less than 1"),
        ("optim.lr_vision=0", "must be greater than 0, or null for optim.lr"),
        ("optim.weight_decay=-1", "must be at least 0"),
        ("data.image_std=[0.5, 0, 0.5]", "must be greater than 0 in each channel"),
        ('data.annotations="a\\0b"', "holds a NUL character"),
        ("train.seed=-1", "must be at least 0 and less than 4294967296"),
        ("model.vision.image_size=1120", "visual_budget=512 must hold at least one image"),
        ("data.anyres_grids=[]", "must be pairs .columns, rows. of at least two tiles"),
        ("data.anyres_grids=[[1, 1]]", "one tile is the base view"),
        ("data.anyres_grids=[[2, 0]]", "must be pairs .columns, rows."),
        ("attention.v2v=full", "attention.v2v='full' is unknown; use one of diagonal, causal"),
        (
            "train.trains=[llm,tower]",
            r"train.trains\[1\]='tower' is unknown; use one of vision, proj",
        ),
        ("train.trains=[]", "train.trains=.. must name one or more of vision, projector, llm"),
        ("train.recompute_visual_chunk=0", "must be greater than 0, or null"),
        ("train.loss_chunk=0", "train.loss_chunk=0 must be greater than 0"),
        ("train.steps=0", "train.steps=0 must be greater than 0"),
        ("optim.warmup_ratio=2", "must lie between 0 and 1"),
    ],
)
def test_one_clear_line(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        checked(override)
    assert "\n" not in str(caught.value)


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        checked("optim.beta2=1.5", "attention.v2v=full", "parallel.sp=true", "model.llm.head_dim=7")
    assert caught.value.mistakes == (
        "attention.v2v='full' is unknown; use one of diagonal, causal",
        "optim.beta2=1.5 must be at least 0 and less than 1",
        "model.llm.head_dim=7 and model.llm.hidden_size=128 must be even (rotary and sinusoidal "
        "positions come in pairs)",
        "parallel.sp=true needs --tp of at least 2; use parallel.sp=false",
    )
    assert error_lines(caught.value).splitlines() == [f"error: {x}" for x in caught.value.mistakes]
    assert "\n" not in str(caught.value)


def test_all_unknown_keys_and_wrong_types_are_reported_at_once():
    overrides = ["optim.lrr=1", "train.seed=x", "data.sources=[{weight: a, zzz: b}]"]
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    first, second, *others = caught.value.mistakes
    assert first.startswith("unknown configuration key 'optim.lrr'; did you mean 'optim.lr'?")
    assert second == "train.seed='x' must be of type int"
    assert [mistake[:30] for mistake in others] == [
        "data.sources[0].weight='a' mus",
        "unknown configuration key 'dat",
    ]


def test_a_size_that_is_refused_hides_no_other_mistake():
    """Rules across settings divide by sizes; 0 must neither crash nor silence them."""
    with pytest.raises(ConfigError) as caught:
        checked("model.llm.num_query_groups=0", "parallel.vpp=2")
    assert "model.llm.num_query_groups=0 must be greater than 0" in caught.value.mistakes
    assert any("parallel.vpp=2 needs --pp" in mistake for mistake in caught.value.mistakes)


def numbers(value, name=""):
    """Dotted names of all numbers of a configuration."""
    for field in dataclasses.fields(value):
        inner, full = getattr(value, field.name), f"{name}{field.name}"
        if dataclasses.is_dataclass(inner):
            yield from numbers(inner, f"{full}.")
        elif ("int" in field.type or "float" in field.type) and "tuple" not in field.type:
            yield full


@pytest.mark.parametrize("value", ["0", "-1", "1", "-0.5", ".nan", ".inf", "-.inf", "7", "1000003"])
@pytest.mark.parametrize("others", [(), ("parallel.tp=2", "parallel.pp=2", "parallel.sp=true")])
def test_no_number_in_any_setting_is_a_traceback(value, others):
    for name in numbers(Config()):
        try:
            checked(*others, f"{name}={value}")
        except ConfigError as error:
            assert all("\n" not in mistake for mistake in error.mistakes)


GEMMA = ["model.family=gemma2"]
YARN = ["model.family=ministral3", "model.llm.rope.kind=yarn"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.llm.activation=gelu_tanh"], "model.family=mistral has activation=silu"),
        (["model.llm.post_norms=true"], "model.family=mistral has post_norms=false"),
        (
            ["model.llm.rope={kind: yarn, factor: 4}"],
            "model.llm.rope={kind: yarn, factor: 4.0} cannot be exported: model.family=mistral has "
            "rope={kind: default}",
        ),
        (["model.family=ministral3"], "model.llm.rope={kind: default} .* has rope.kind=yarn"),
        (
            ["model.llm.rotary_pattern=[true, false]"],
            r"rotary_pattern=\[true, false\] .* has rotary_pattern=\[\]; use that",
        ),
        (["model.llm.rope.kind=none"], "'none' is unknown; use one of default, linear, llama3, ya"),
        (
            ["model.llm.rope.attention_factor=1.5"],
            "rope.attention_factor=1.5 has no effect with rope.kind=default; leave it out",
        ),
        ([*YARN, "model.llm.rope.beta_slow=40"], "beta_slow=40.0 must be less than beta_fast=32.0"),
        ([*YARN, "model.llm.rotary_base=1"], "rotary_base=1.0 must be greater than 1 with rope.ki"),
        ([*YARN, "model.llm.rope.query_scale_beta=-1"], "must be at least 0 .0: none."),
        (["model.llm.attention_softcap=50"], "model.family=mistral has attention_softcap=null"),
        (["model.llm.query_scale=24"], "has query_scale=null; use that, or"),
        (
            ["model.llm.sliding_window=8", "model.llm.layer_pattern=[sliding, full]"],
            r"model.llm.layer_pattern=\[sliding, full\] cannot be exported: model.family=mistral has",
        ),
        ([*GEMMA, "model.llm.activation=silu"], "model.family=gemma2 has activation=gelu_tanh"),
        (
            ["model.llm.layer_pattern=[half]"],
            r"layer_pattern\[0\]='half' is unknown; use one of sliding",
        ),
        (["model.llm.layer_pattern=[full]"], "no effect without model.llm.sliding_window"),
        ([*GEMMA, "model.llm.query_scale=24.5"], "has a whole number as query_scale"),
        (
            [*GEMMA, "model.llm.num_attention_heads=12"],
            "model.llm.hidden_size=128 .* a multiple of num_attention_heads=12",
        ),
    ],
)
def test_a_model_that_cannot_be_exported_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        checked(*overrides)


# A value of each size that some families alone can hold, other than its default.
OTHER_SIZES = {
    "sliding_rotary_base": "5000",
    "rope": "{kind: llama3, factor: 8}",
    "rotary_pattern": "[true, false]",
    "attention_softcap": "50",
    "final_softcap": "30",
    "query_scale": "16",
    "sliding_window": "8",
    "layer_pattern": "[sliding, full]",
}


def test_a_family_refuses_each_size_that_it_does_not_hold():
    """By default: a new size needs no word in any family's file."""
    sizes = {field.name for field in dataclasses.fields(LlmConfig)}
    assert sizes - set(HELD_BY_ALL) == set(OTHER_SIZES)
    for family, record in language_models().items():
        assert set(record.holds) <= set(OTHER_SIZES)
        for name in OTHER_SIZES.keys() - set(record.holds):
            line = rf"llm.{name}=.* cannot be exported: model.family={family} has {name}=.*; use t"
            with pytest.raises(ConfigError, match=line):
                checked(f"model.family={family}", f"model.llm.{name}={OTHER_SIZES[name]}")


def test_norms_that_a_family_does_not_have_are_not_computed_again(monkeypatch):
    record = language_models()["mistral"]
    norms = LayerNorms(attention_output="a_layernorm", mlp_output="b_layernorm")
    features = dataclasses.replace(record.features, norms=norms)
    again = ["train.recompute=selective", "train.recompute_modules=[layernorm]"]
    checked(*again)
    monkeypatch.setitem(
        language_models(), "mistral", dataclasses.replace(record, features=features)
    )
    with pytest.raises(ConfigError, match="has no effect: layers of model.family=mistral have no "):
        checked(*again)


def test_what_a_family_has_passes():
    checked("model.llm.query_scale=32", "model.llm.sliding_window=8")
    checked("model.llm.sliding_window_every=2")  # without a window it means nothing
    checked(*GEMMA, "model.llm.query_scale=24", "model.llm.post_norms=true")
    of_before = checked(*GEMMA, "model.llm.sliding_window=8", "model.llm.sliding_window_every=3")
    assert of_before.model.llm.windows == (8, None, None, 8)


def test_a_setting_of_the_model_that_is_the_runs_now():
    assert checked("model.transformer_impl=local").train.transformer_impl == "local"
    assert checked("train.transformer_impl=local").train.transformer_impl == "local"
    both = ("model.transformer_impl=local", "train.transformer_impl=local")
    assert checked(*both).train.transformer_impl == "local"
    with pytest.raises(ConfigError, match="is the former name of train.transformer_impl, which is"):
        checked("model.transformer_impl=auto", both[1])


def test_epochs_count_where_steps_do_not():
    assert checked("train.epochs=2", "train.steps=null").train.epochs == 2


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--tensor-model-parallel-size", "did you mean --tp?"),
        ("--pipeline-model-parallel-size=2", "did you mean --pp?"),
        ("--global-batch-size", "did you mean train.global_batch_size=...?"),
        ("--lr=1", "did you mean optim.lr=...?"),
        ("--devices", "did you mean --device?"),
        ("--zzz", "--help lists the flags."),
        ("--val-interval", "the held-out loss has settings in validation"),
        ("--wandb-project", "did you mean log.project=...?"),
    ],
)
def test_unknown_flags(flag, hint):
    with pytest.raises(ConfigError) as caught:
        parse_arguments([flag, "2"])
    assert str(caught.value).startswith(f"flag {flag.partition('=')[0]} is unknown; {hint}")


def test_wrong_process_count():
    config = checked("parallel.tp=4", "parallel.pp=2")
    with pytest.raises(ConfigError) as caught:
        data_parallel_size(config, 6)
    assert str(caught.value) == (
        "tp (4) x pp (2) needs a multiple of 8 processes, got 6; "
        "run torchrun --nproc-per-node 8 pretrain_dattn.py ..."
    )


def test_visual_chunks_need_rows_that_see_only_themselves():
    config = load_config(None, ["train.recompute_visual_chunk=64", "attention.v2v=causal"])
    with pytest.raises(ConfigError, match="needs attention.v2v=diagonal .* use train.recompute"):
        check_config(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lr: 1}\noptim: {lr: 2}\n", r"bad.yaml:2: key 'optim' stands twice"),
        ("optim: [\n", r"bad.yaml:2: "),
        ("- a\n", "holds no sections"),
        ("base: bad.yaml\n", "break the circle"),
        ("!!python/object/apply:os.system ['true']\n", "correct the YAML"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"optim:\n  lr: 1\0\n", r"bad.yaml:2: character 0x0 cannot stand in YAML"),
        ("log:\n  run_dir: caf\u00e9\n".encode("latin-1"), r"bad.yaml: is not UTF-8 .byte 0xe9"),
        (b"[" * 20_000, "bad.yaml: is nested too deeply"),
        (b"optim: " + b"{a: " * 20_000, "bad.yaml: is nested too deeply"),
        (b"optim:\n  lr: " + b"7" * 5000, "bad.yaml:2: the value of 'lr' cannot be read as int"),
        (b"train:\n  steps: 0x" + b"f" * 5000, "train.steps is a number of more than 18 digits"),
        (b"data:\n  image_mean: [0.5, 0x" + b"f" * 5000 + b"]", "image_mean=.* must have 3 values"),
        (b"? [optim, lr]\n: 1\n", "bad.yaml:1: a list or a mapping as a key"),
        (b"optim:\n  ? {lr: 1}\n  : 1\n", "bad.yaml:2: a list or a mapping as a key"),
        (b"optim:\n  1: 2\n", "bad.yaml:2: '1' as a key is no name of a setting"),
        (b"optim:\n  ~: 2\n", "bad.yaml:2: '~' as a key is no name"),
        (b"log:\n  run_dir: 2024-99-99\n", "bad.yaml:2: the value of 'run_dir' cannot be read as"),
        (b"optim:\n  lr: !!int ''\n", "bad.yaml:2: the value of 'lr' cannot be read as int"),
        (b"optim:\n  lr: !!bool maybe\n", "bad.yaml:2: the value of 'lr' cannot be read as bool"),
        (b"a: &a [*a]\n", "bad.yaml:1: not valid YAML .*recursive"),
        (b'base: "a\\0b"\n', r"base: 'a\\x00b' is no file"),
        (b"optim:\n  <<: 3\n", "bad.yaml:2: << takes a mapping or a list of mappings"),
        (b"optim: &a {lr: 1}\ndata:\n  <<: *a\n  <<: *a\n", "bad.yaml:4: key '<<' stands twice"),
        (b"optim: *nowhere\n", "bad.yaml:1: not valid YAML .found undefined alias"),
        (b"--- {}\n--- {}\n", "bad.yaml:2: not valid YAML"),
    ],
    ids=lambda value: value[:24] if isinstance(value, bytes) else "",
)
def test_hostile_files_are_one_line(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=" + "[" * 20_000, "is nested too deeply"),
        ("optim.lr=" + "7" * 5000, "a value cannot be read"),
        ("optim.lr=1\0", "character 0x0 cannot stand in YAML"),
        ("optim.lr=*x", "^argument 'optim.lr=.x': not valid YAML .found undefined alias"),
        ("optim.lr={? [a] : 1}", "^argument .*: a list or a mapping as a key"),
        ("train.steps=0x" + "f" * 5000, "train.steps is a number of more than 18 digits"),
        ("data.image_mean=[0x" + "f" * 5000 + "]", "must have 3 values"),
        (".".join("a" * 3000) + "=1", "is not understood; write section.key=value"),
    ],
    ids=range(8),
)
def test_hostile_arguments_are_one_line(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, [override, override])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_text_that_grows_without_bound_is_shown_short(tmp_path):
    """Each line has ten of the line before: ten thousand million entries, written out."""
    path = tmp_path / "bad.yaml"
    lines = ["a0: &a0 [" + ", ".join(["x"] * 10) + "]"]
    lines += [f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * 10) + "]" for n in range(1, 10)]
    path.write_text("\n".join(lines) + "\noptim:\n  lr: *a9\n")
    with pytest.raises(ConfigError, match="unknown configuration key 'a0'"):
        load_config(path)
    path.write_text(
        "optim:\n  lr:\n    - &a0 [x, x]\n"
        + "".join(f"    - &a{n} [" + ", ".join([f"*a{n - 1}"] * 10) + "]\n" for n in range(1, 10))
    )
    with pytest.raises(ConfigError, match=r"optim.lr=\[.*\.\.\. must be of type float") as caught:
        load_config(path)
    assert len(str(caught.value)) < 2000


def test_merge_keys(tmp_path):
    """YAML 1.1: own keys win over merged ones, and the first of several mappings wins."""
    path = tmp_path / "merged.yaml"
    path.write_text(
        """
optim: &one
  lr: 1.0
  beta1: 0.5
train: &two {seed: 3, epochs: 2.0}
data:
  sources:
    - &first {annotations: a.json, weight: 2.0}
    - {<<: *first, annotations: b.json}
    - <<: [{format: tar}, {format: json, weight: 3.0, annotations: c}]
""",
        encoding="utf-8",
    )
    config = load_config(path)
    assert config.optim.lr == 1.0
    assert [(s.annotations, s.weight, s.format) for s in config.data.sources] == [
        ("a.json", 2.0, "auto"),
        ("b.json", 2.0, "auto"),
        ("c", 3.0, "tar"),
    ]
    override = "data.sources=[{<<: {annotations: x.json}, weight: 0.5}]"
    (source,) = load_config(path, [override]).data.sources
    assert (source.annotations, source.weight) == ("x.json", 0.5)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read .*No such file"):
        load_config(tmp_path / "none.yaml")


def test_the_visual_budget_holds_the_largest_anyres_plan():
    """The digits' tile has 4 rows; a base view and 2 x 2 tiles have 20."""
    overrides = ["data.image_policy=anyres_stretch", "data.anyres_grids=[[1, 2], [2, 2]]"]
    assert checked(*overrides, "data.visual_budget=20").data.max_tiles == 5
    with pytest.raises(ConfigError, match="of 5 tiles .* 20 rows"):
        checked(*overrides, "data.visual_budget=19")
