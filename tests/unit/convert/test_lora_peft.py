"""Adapters against `peft` on the exported model: logits, gradients, and folders both ways."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dattn_mcore.architectures import language_models
from dattn_mcore.architectures.adapters import adapter_table, summed_weight
from dattn_mcore.architectures.parameters import part_of
from dattn_mcore.architectures.tables import model_table
from dattn_mcore.checkpoint.adapters import describe_base
from dattn_mcore.checkpoint.base_sums import EXPORTED
from dattn_mcore.checkpoint.load import load_weights
from dattn_mcore.checkpoint.manifest import (
    describe_tokenizer,
    new_manifest,
    read_manifest,
    write_manifest,
)
from dattn_mcore.checkpoint.mixing import split
from dattn_mcore.checkpoint.peft_folder import (
    SETTINGS,
    WEIGHTS,
    peft_name,
    read_peft_folder,
    write_peft_folder,
)
from dattn_mcore.config.load import from_dict
from dattn_mcore.config.lora import adapters_of
from dattn_mcore.config.schema import LoraConfig
from dattn_mcore.data.batch import MicroBatch
from dattn_mcore.errors import CheckpointError
from dattn_mcore.evaluation.__main__ import main
from dattn_mcore.evaluation.adapter import with_adapter
from dattn_mcore.hf import DattnForConditionalGeneration
from dattn_mcore.layers.adaptable import adapter_names
from dattn_mcore.models.initialize import fill
from dattn_mcore.parallel.groups import single_process
from dattn_mcore.training.inputs import to_model_inputs
from dattn_mcore.training.model import build_from_config, start_adapters
from tests.unit.convert.convert_helpers import (
    make_checkpoint,
    make_tokenizer,
    plan,
    random_tensors,
    small_config,
)
from tests.unit.evaluation.trees import make_tree
from tools.checkpoint_convert.dist_checkpoint import write_checkpoint
from tools.checkpoint_convert.mcore_to_hf import ExportOptions, convert
from tools.checkpoint_convert.peft_out import write_peft

peft = pytest.importorskip("peft", reason="peft is an extra (dev)")

ALL = ("*.{q,k,v,o,gate,up,down}_proj",)
SOME = ("*.layers.{0..1}.self_attn.{q,v}_proj", "*.layers.2.mlp.{gate,up,down}_proj", "*.o_proj")
BEFORE, AFTER = 3, 20
BASELINE = {"v2v": "causal", "t2v_position": "rope"}


def adapted(folder, family, lora, **attention):
    """A configuration with adapters, the random base that it names, and that base's export."""
    config = small_config(make_tokenizer(folder), family, template="plain")
    config = replace(config, attention=replace(config.attention, **attention))
    make_checkpoint(folder / "base", config)
    convert(folder / "base", folder / "hf")
    checkpoint = replace(config.checkpoint, init_from=str(folder / "base"))
    train = replace(config.train, trains=("llm",))
    return replace(config, lora=lora, checkpoint=checkpoint, train=train)


def random_adapters(config, seed=3):
    """Adapters by peft's names, none of them 0: no product may be hidden."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for entry in adapter_table(config.model, adapters_of(config)):
        for layer in entry.steps():
            for name, shape in zip(entry.names(layer), entry.parts.values(), strict=True):
                noise = torch.randn(shape, generator=generator)
                tensors[name] = noise.abs() + 0.5 if "magnitude" in name else 0.2 * noise
    return tensors


def example(config):
    """Ids, labels and two tiles of one sample: text, an image of one tile twice, text."""
    generator = torch.Generator().manual_seed(1)
    vision = config.model.vision
    ids = torch.randint(5, 300, (BEFORE + AFTER,), generator=generator)
    labels = ids.roll(-1)
    labels[:BEFORE] = labels[-1] = -100
    shape = (2, 3, vision.image_size, vision.image_size)
    tiles = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return ids, labels, tiles


def by_trainer(config, folder):
    """Logits and gradients by peft's names, of the mean loss."""
    ids, labels, tiles = example(config)
    rows = config.model.vision.rows_per_tile * len(tiles)
    batch = MicroBatch(
        layouts=(((False, BEFORE), (True, rows), (False, AFTER)),),
        text_ids=ids,
        labels=labels,
        num_tiles=len(tiles),
        tiles=tiles,
        sample_ids=("one",),
        num_samples=1,
    )
    table = adapter_table(config.model, adapters_of(config))
    with single_process() as groups:
        (model,) = build_from_config(config, groups, torch.device("cpu"), initialize=False)
        load_weights(Path(config.checkpoint.init_from), config, [model], groups)
        read = read_peft_folder(folder, config.model, adapters_of(config))
        fill([model], table, read.value, others=True)
        inputs = to_model_inputs(batch, config, groups, torch.device("cpu"))
        logits = model(inputs, return_logits=True)[: len(ids), : config.model.llm.vocab_size]
        losses = model(inputs)
        losses.sum().div(int((labels != -100).sum())).backward()
        learn = {name for name, p in model.named_parameters() if p.requires_grad}
        assert learn == adapter_names(model)
        gradients = {}
        modules = dict(model.named_parameters())
        for entry in table:
            for place in entry.steps():
                name = entry.key.replace(".layers.", f".layers.{entry.number(place)}.")
                parts = split(entry, modules[name].grad)
                gradients.update(zip(entry.names(place), parts, strict=True))
        return logits.detach(), gradients


def by_peft(config, export, folder):
    """The same by peft on the exported base."""
    ids, labels, tiles = example(config)
    base = DattnForConditionalGeneration.from_pretrained(export, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder, is_trainable=True).train()
    mark = base.config.image_token_id
    images = torch.full((len(tiles),), mark)
    ids = torch.cat([ids[:BEFORE], images, ids[BEFORE:]])
    pixels = (tiles.float() / 255 - 0.5) / 0.5
    logits = model(input_ids=ids[None], pixel_values=pixels).logits[0]
    logits = torch.cat([logits[:BEFORE], logits[BEFORE + len(tiles) :]])
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100)
    loss.backward()
    gradients = {
        name.replace(".default", "").removesuffix(".weight")
        + ("" if "magnitude" in name else ".weight"): p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return logits.detach(), gradients


CASES = {
    "mistral": ("mistral", ALL, False, {}),
    "gemma2": ("gemma2", ALL, False, {}),
    "some, dora": ("mistral", SOME, True, {}),
    "gemma2, dora": ("gemma2", ALL, True, {}),
    "biases, dora": ("qwen2", ALL, True, {}),
    "unfolded": ("mistral", SOME, False, {"fold_visual_projection": False}),
    "baseline": ("mistral", ALL, True, BASELINE),
    "gemma2, baseline": ("gemma2", SOME, False, BASELINE),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_logits_and_gradients_are_those_of_peft(tmp_path, case):
    """In float32: sums in another order differ by about 1e-6 of what is summed."""
    family, targets, dora, attention = case
    lora = LoraConfig(targets=targets, rank=3, alpha=5.0, dora=dora)
    config = adapted(tmp_path, family, lora, **attention)
    adapters = adapters_of(config)
    (tmp_path / "adapter").mkdir()
    write_peft_folder(tmp_path / "adapter", adapters, random_adapters(config), base=None)
    ours, our_gradients = by_trainer(config, tmp_path / "adapter")
    theirs, their_gradients = by_peft(config, tmp_path / "hf", tmp_path / "adapter")
    plain = DattnForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert plain is not None
    assert (ours - theirs).abs().max() < 1e-5 * max(1.0, float(theirs.abs().max()))
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        assert gradient.abs().max() > 0, name
        difference = (our_gradients[name] - gradient).abs().max()
        assert difference < 2e-5 * gradient.abs().max() + 1e-7, name


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two linears of each layer, and a folder of peft for them."""
    folder = tmp_path_factory.mktemp("small")
    lora = LoraConfig(targets=("*.{v,up}_proj",), rank=2, alpha=4.0, dora=True)
    config = adapted(folder, "mistral", lora)
    (folder / "adapter").mkdir()
    adapters = adapters_of(config)
    write_peft_folder(folder / "adapter", adapters, random_adapters(config), base="base")
    return folder, config


def changed_folder(source, target, settings=None, weights=None):
    """A copy of a folder of peft, with some settings or tensors changed."""
    target.mkdir()
    known = json.loads((source / SETTINGS).read_text())
    (target / SETTINGS).write_text(json.dumps(known | (settings or {})))
    save_file((weights or dict)(load_file(source / WEIGHTS)), target / WEIGHTS)
    return target


def without_the_first(tensors):
    return dict(sorted(tensors.items())[1:])


def with_one_more(tensors):
    return {**tensors, "base_model.model.lm_head.lora_A.weight": torch.zeros(2, 32)}


def in_another_shape(tensors):
    name = min(tensors)
    return {**tensors, name: torch.zeros(2, 64)}


@pytest.mark.parametrize(
    ("settings", "weights", "message"),
    [
        ({"r": 4}, None, "has r=4, and lora.rank is 2; set both the same"),
        ({"lora_alpha": 8}, None, "has lora_alpha=8, and lora.alpha is 4.0"),
        ({"use_dora": False}, None, "has use_dora=False, and lora.dora is True"),
        ({"peft_type": "IA3"}, None, "is of 'IA3'; only LORA is known"),
        ({"init_lora_weights": "pissa"}, None, "has init_lora_weights='pissa', which this trainer"),
        ({"modules_to_save": ["lm_head"]}, None, "has 'lm_head' in modules_to_save; beside adapt"),
        ({"use_rslora": True}, None, "has use_rslora=True, which this trainer cannot compute"),
        ({}, without_the_first, "is an adapter of another base model, or of other linears: it la"),
        ({}, with_one_more, "it has base_model.model.lm_head.lora_A.weight, which is not adapted"),
        ({}, in_another_shape, r"is \[2, 64\] there and \[2, 32\] here"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(small, tmp_path, settings, weights, message):
    folder, config = small
    other = changed_folder(folder / "adapter", tmp_path / "other", settings, weights)
    with pytest.raises(CheckpointError, match=message) as error:
        read_peft_folder(other, config.model, adapters_of(config))
    assert str(error.value).startswith(f"lora.init_from={other}") and "\n" not in str(error.value)


@pytest.mark.parametrize("name", [SETTINGS, WEIGHTS])
def test_a_broken_folder_is_refused(small, tmp_path, name):
    folder, config = small
    other = changed_folder(folder / "adapter", tmp_path / "other")
    (other / name).write_bytes((other / name).read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        read_peft_folder(other, config.model, adapters_of(config))
    (other / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        read_peft_folder(other, config.model, adapters_of(config))


def saved_adapters(folder, config):
    """A checkpoint of these adapters, as a run saves them."""
    read = read_peft_folder(folder / "adapter", config.model, adapters_of(config))
    table = adapter_table(config.model, adapters_of(config))
    tensors = {
        (entry.key, place): read.value(entry, place) for entry in table for place in entry.steps()
    }
    path = folder / "step_00000001"
    if not path.exists():
        known = write_tensors_of(path, table, tensors, config)
        fields = new_manifest(
            config, 1, describe_tokenizer(config), base=describe_base(folder / "base")
        )
        write_manifest(path, fields, known)
    return path


def write_tensors_of(path, table, tensors, config):
    """The files of a checkpoint, and what a manifest says of them."""
    write_checkpoint(path, plan(table, tensors), config)
    return read_manifest(path)["files"]


def logits_of(model, config):
    ids, _, tiles = example(config)
    images = torch.full((len(tiles),), model.config.image_token_id)
    ids = torch.cat([ids[:BEFORE], images, ids[BEFORE:]])
    with torch.no_grad():
        return model.eval()(ids[None], (tiles.float() / 255 - 0.5) / 0.5).logits[0]


def test_exports_merged_and_as_a_folder_of_peft(small, tmp_path):
    """Both answer as peft does with what the run started from; the folder comes back bit by bit."""
    folder, config = small
    checkpoint = saved_adapters(folder, config)
    convert(checkpoint, tmp_path / "merged", ExportOptions(check=True))
    line = write_peft(checkpoint, tmp_path / "peft", name=str(folder / "hf"))
    assert line.startswith("6 adapters of base ")
    ours, theirs = (load_file(path / WEIGHTS) for path in (tmp_path / "peft", folder / "adapter"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())

    def base():
        return DattnForConditionalGeneration.from_pretrained(folder / "hf", dtype=torch.float32)

    adapted_by_peft = peft.PeftModel.from_pretrained(base(), tmp_path / "peft")
    want = logits_of(adapted_by_peft, config)
    merged = DattnForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    bound = 1e-5 * max(1.0, float(want.abs().max()))
    assert (logits_of(merged, config) - want).abs().max() < bound
    assert (logits_of(with_adapter(base(), tmp_path / "peft"), config) - want).abs().max() < bound
    assert (logits_of(base(), config) - want).abs().max() > 100 * bound


def test_adapters_of_another_model_are_refused_in_evaluation(small, tmp_path):
    folder, _ = small
    model = DattnForConditionalGeneration.from_pretrained(folder / "hf", dtype=torch.float32)
    other = changed_folder(folder / "adapter", tmp_path / "other", None, without_the_first)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        with_adapter(model, other)
    with pytest.raises(CheckpointError, match="has no adapter_config.json"):
        with_adapter(model, tmp_path)


def test_a_base_that_is_gone_or_another_is_one_line(small, tmp_path):
    folder, config = small
    checkpoint = saved_adapters(folder, config)
    make_checkpoint(tmp_path / "other", config)
    with pytest.raises(CheckpointError, match="which is another checkpoint; name the base"):
        convert(checkpoint, tmp_path / "out", ExportOptions(base=str(tmp_path / "other")))
    moved = folder / "moved"
    (folder / "base").rename(moved)
    try:
        with pytest.raises(CheckpointError, match="which is not there; name their base by --base"):
            convert(checkpoint, tmp_path / "out")
        convert(checkpoint, tmp_path / "out", ExportOptions(base=str(moved)))
    finally:
        moved.rename(folder / "base")
    with pytest.raises(CheckpointError, match="holds a whole model, no adapters"):
        write_peft(folder / "base", tmp_path / "peft")


def test_the_sums_of_a_base_are_of_one_weight_in_every_family():
    for family in language_models():
        model = from_dict({"model": {"family": family}}).model
        assert summed_weight(model).names(0) == [EXPORTED]


def test_another_base_of_the_same_shapes_is_refused(small, tmp_path):
    """By the run that would start from the adapters, and by evaluation; the own base is taken."""
    folder, config = small
    write_peft(saved_adapters(folder, config), tmp_path / "peft")
    table = model_table(config.model)
    tensors = random_tensors(table, torch.float32)
    tensors[summed_weight(config.model).key, 0][1, 1] += 0.01  # one weight of all
    write_checkpoint(tmp_path / "base", plan(table, tensors), config)
    for base, fits in ((folder / "base", True), (tmp_path / "base", False)):
        convert(base, tmp_path / f"hf-{fits}")
        model = DattnForConditionalGeneration.from_pretrained(tmp_path / f"hf-{fits}")
        refused = pytest.raises(CheckpointError, match="is an adapter of another base model: its")
        with contextlib.nullcontext() if fits else refused:
            with_adapter(model, tmp_path / "peft")
        lora = replace(config.lora, init_from=str(tmp_path / "peft"))
        started = replace(config, lora=lora)
        with single_process() as groups, contextlib.nullcontext() if fits else refused:
            (model,) = build_from_config(started, groups, torch.device("cpu"), initialize=False)
            load_weights(base, started, [model], groups)
            start_adapters(started, adapters_of(started), [model])


def with_own_projector(folder, config, learns):
    """A configuration that starts from adapters and a projector, and that projector by its names."""
    read = load_file(folder / "adapter" / WEIGHTS)
    generator = torch.Generator().manual_seed(8)
    projector = {
        peft_name(name): torch.randn(shape, generator=generator)
        for entry in model_table(config.model)
        for name, shape in entry.parts.items()
        if part_of(name) == "projector"
    }
    target = folder / f"with-projector-{learns}"
    changed_folder(
        folder / "adapter",
        target,
        {"modules_to_save": ["multi_modal_projector"]},
        lambda _: {**read, **projector},
    )
    trains = ("projector", "llm") if learns else ("llm",)
    train, lora = replace(config.train, trains=trains), replace(config.lora, init_from=str(target))
    return replace(config, train=train, lora=lora), projector


@pytest.mark.parametrize("learns", [True, False])
def test_a_run_starts_from_adapters_and_a_projector(small, learns):
    """As an export writes them that learnt both. It must learn, else checkpoints would lack it."""
    folder, config = small
    config, projector = with_own_projector(folder, config, learns)
    refused = pytest.raises(CheckpointError, match="holds a projector of its own, and projector")
    with single_process() as groups, contextlib.nullcontext() if learns else refused:
        (model,) = build_from_config(config, groups, torch.device("cpu"), initialize=False)
        load_weights(Path(config.checkpoint.init_from), config, [model], groups)
        start_adapters(config, adapters_of(config), [model])
        parameters = dict(model.named_parameters())
        for entry in model_table(config.model):
            if part_of(entry.key or "") == "projector":
                parts = split(entry, parameters[entry.key].detach())
                for name, part in zip(entry.parts, parts, strict=True):
                    assert torch.equal(part, projector[peft_name(name)]), name


def test_evaluation_with_an_adapter_answers_as_the_merged_export(small, tmp_path):
    """By the command, and not as the base alone."""
    folder, config = small
    checkpoint = saved_adapters(folder, config)
    write_peft(checkpoint, tmp_path / "peft")
    convert(checkpoint, tmp_path / "merged")
    convert(folder / "base", tmp_path / "hf")
    data = make_tree(tmp_path / "val")
    common = [f"--data={data}", "--benchmarks=pope", "--device=cpu", "--max-new-tokens=6"]
    given = {
        "added": [f"--model={tmp_path / 'hf'}", f"--adapter={tmp_path / 'peft'}"],
        "merged": [f"--model={tmp_path / 'merged'}"],
        "alone": [f"--model={tmp_path / 'hf'}"],
    }
    answers = {}
    for name, model in given.items():
        out = tmp_path / name
        assert main(["run", *model, *common, f"--out={out}"]) == 0
        text = (out / "answers/pope.jsonl").read_text()
        answers[name] = [json.loads(line)["text"] for line in text.splitlines()]
    assert answers["added"] == answers["merged"] != answers["alone"]
