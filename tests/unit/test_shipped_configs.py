"""Every shipped YAML loads, passes the checks, and fits one process and its own layout."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.image_processing_auto import (
    IMAGE_PROCESSOR_MAPPING_NAMES,
    get_image_processor_class_from_name,
)

from dattn_mcore.architectures import language_model, vision_towers
from dattn_mcore.architectures.tables import language_table, model_table, tower_table
from dattn_mcore.config.checks import check_config, data_parallel_size, processes_per_replica
from dattn_mcore.config.load import load_config
from dattn_mcore.config.schema import Config
from dattn_mcore.data.tiles import ANYRES_POLICIES
from dattn_mcore.training.dry_run import describe, stage_summary
from tools.checkpoint_convert.configs import (
    TokenIds,
    text_from_hf,
    text_to_hf,
    vision_from_hf,
    vision_to_hf,
)
from tools.checkpoint_convert.tables import mcore_shapes

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PARTS = sorted((ROOT / "configs").glob("*/*.yaml"))
STAGES = ("aln", "pt", "it")
DIGITS = [ROOT / "configs" / f"digits_{stage}.yaml" for stage in ("align", "pretrain", "instruct")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_it_runs_in_its_own_layout_and_in_one_process(path):
    config = load_config(path)
    check_config(config)
    assert data_parallel_size(config, processes_per_replica(config)) == 1
    alone = ["parallel.tp=1", "parallel.pp=1", "parallel.vpp=1", "parallel.sp=false"]
    check_config(load_config(path, alone))


@pytest.mark.parametrize("policy", ANYRES_POLICIES)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_it_holds_the_largest_anyres_image(path, policy):
    config = load_config(path, [f"data.image_policy={policy}"])
    check_config(config)
    assert config.data.max_tiles == 5  # 3,645 rows of SigLIP so400m


@pytest.mark.parametrize("path", [None, *DIGITS], ids=lambda path: path.name if path else "default")
def test_the_digits_model_fits_tensor_parallel_4_and_pipeline_parallel_2(path):
    config = load_config(path, ["parallel.tp=4", "parallel.pp=2"])
    check_config(config)
    assert data_parallel_size(config, 8) == 1


@pytest.mark.parametrize("path", PARTS, ids=lambda path: path.name)
def test_a_part_holds_known_settings_only(path):
    load_config(path)


@pytest.mark.parametrize("path", [*CONFIGS, *PARTS], ids=lambda path: path.name)
def test_a_base_file_says_what_it_is(path):
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_the_stages_of_the_digits_task_share_a_model_and_follow_each_other():
    align, pretrain, instruct = (load_config(path) for path in DIGITS)
    assert align.model == pretrain.model == instruct.model
    assert pretrain.checkpoint.init_from == align.log.run_dir
    assert instruct.checkpoint.init_from == pretrain.log.run_dir
    assert len({config.log.run_dir for config in (align, pretrain, instruct)}) == 3


def test_the_embedded_default_is_the_pretrain_stage_of_the_digits_task():
    default, pretrain = Config(), load_config(DIGITS[1])
    assert default.model == pretrain.model
    assert default.data == pretrain.data
    assert default.train.stage == pretrain.train.stage


# The real models, with the published totals of their language models; the tables of the converter
# and the dry run must both reach them.
TOTALS = {
    "mistral": 7_248_023_552,
    "gemma": 9_241_705_984,
    "qwen3_8b": 8_190_735_360,
    "llama3_1_8b": 8_030_261_248,
    "gemma3_4b": 3_880_263_168,
}


def test_every_real_model_is_among_those():
    assert {path.stem.removesuffix("_aln") for path in CONFIGS if "_aln" in path.stem} == set(
        TOTALS
    )


@pytest.mark.parametrize("llm", TOTALS)
def test_the_stages_of_a_real_model_follow_each_other(llm):
    align, pretrain, instruct = (
        load_config(ROOT / f"configs/{llm}_{stage}.yaml") for stage in STAGES
    )
    assert align.model == pretrain.model == instruct.model
    assert align.checkpoint.init_from == f"checkpoints/{llm}_siglip"
    assert pretrain.checkpoint.init_from == align.log.run_dir
    assert instruct.checkpoint.init_from == pretrain.log.run_dir
    assert align.train.trains == ("projector",)
    assert [c.optim.lr for c in (align, pretrain, instruct)] == [1e-3, 2e-5, 2e-5]
    assert [c.train.global_batch_size for c in (align, pretrain, instruct)] == [256, 256, 128]
    own = language_model(align.model.family).chat.name
    assert [c.data.template for c in (align, pretrain, instruct)] == ["plain", "plain", own]
    assert {c.data.prepare for c in (align, pretrain, instruct)} == {"none"}


IDS = TokenIds(bos=1, eos=2, pad=0, image=3, stop=(2,))


@pytest.mark.parametrize("llm", TOTALS)
def test_the_real_models_have_their_true_number_of_parameters(llm):
    alone = ["parallel.tp=1", "parallel.pp=1", "parallel.sp=false", "train.trains=[llm]"]
    unpadded = "model.llm.vocab_pad_multiple=1"
    config = load_config(ROOT / f"configs/{llm}_it.yaml", [*alone, unpadded])
    shapes = mcore_shapes(model_table(config.model))
    language = ("embedding.", "decoder.", "output_layer.")
    found = sum(math.prod(s) for key, s in shapes.items() if key.startswith(language))
    assert found == TOTALS[llm]
    everything, language_model, _ = stage_summary(config, 0)
    assert language_model == TOTALS[llm]
    assert everything == sum(math.prod(shape) for shape in shapes.values())


MODELS = [path for path in PARTS if "family:" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_language_model_is_the_one_of_transformers(path):
    """As many parameters, which the file also states, and sizes that go there and come back."""
    model = load_config(path).model
    theirs = text_to_hf(model, IDS, torch.bfloat16)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(theirs)
    count = sum(parameter.numel() for parameter in built.parameters())
    unpadded = replace(model, llm=replace(model.llm, vocab_pad_multiple=1))
    assert sum(math.prod(entry.mcore_shape()) for entry in language_table(unpadded)) == count
    config = load_config(path, ["train.trains=[llm]"])  # as the planner and the dry run count
    alone = replace(config.parallel, tp=1, pp=1, vpp=1, sp=False, first_stage_layers=None)
    assert stage_summary(replace(config, model=unpadded, parallel=alone), 0)[1] == count
    text = path.read_text(encoding="utf-8")
    if "parameters without tower" in text:
        assert f"{count:,} parameters without tower and projector" in text
    family, llm = text_from_hf(theirs, model.llm.vocab_pad_multiple)
    scale = {"query_scale": model.llm.query_scale, "layer_pattern": model.llm.layer_pattern}
    assert llm.windows == model.llm.windows
    assert (family, replace(llm, **scale)) == (model.family, model.llm)


def image_processor_of(model_type):
    """The class that transformers takes for the images of a type of model."""
    return get_image_processor_class_from_name(IMAGE_PROCESSOR_MAPPING_NAMES[model_type]["pil"])


TOWERS = [path for path in PARTS if "kind:" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", TOWERS, ids=lambda path: path.stem)
def test_a_tower_is_the_one_of_transformers(path):
    """As many parameters, sizes that go there and come back, and the pixels of its processor."""
    config = load_config(path)
    vision = config.model.vision
    theirs = vision_to_hf(vision, torch.bfloat16)
    back = vision_from_hf(theirs, vision.select_layer)
    assert replace(back, init_std=vision.init_std) == vision
    theirs.num_hidden_layers = vision.layers_run
    with torch.device("meta"):
        built = AutoModel.from_config(theirs)
    record = vision_towers()[vision.kind]
    processor = image_processor_of(record.folder_types[0])
    for name in ("image_mean", "image_std"):
        stated = (getattr(config.data, name), getattr(record, name))
        assert stated == (tuple(getattr(processor, name)),) * 2
    unread = built.get_submodule(record.names.final_norm)
    if record.features.final_norm and vision.select_layer == -1:
        unread = torch.nn.Identity()
    count = sum(p.numel() for p in built.parameters()) - sum(p.numel() for p in unread.parameters())
    table = tower_table(replace(Config().model, vision=vision))
    assert sum(math.prod(entry.mcore_shape()) for entry in table) == count


@pytest.mark.parametrize(
    ("tower", "rows", "parameters"),
    [
        # transformers' SiglipVisionModel without head, post-norm and last layer
        ("siglip_so400m_384", 729, 397_745_440),
        ("siglip2_so400m_384", 729, 397_745_440),
        # transformers' CLIPVisionModel without post-norm and last layer
        ("clip_l_336", 576, 290_909_184),
        # transformers' Aimv2VisionModel without head
        ("aimv2_l_336", 576, 309_525_504),
        ("aimv2_l_448", 1024, 309_984_256),
    ],
)
@pytest.mark.parametrize("llm", TOTALS)
def test_every_tower_goes_with_every_language_model(tmp_path, llm, tower, rows, parameters):
    file = tmp_path / "run.yaml"
    bases = [f"{ROOT}/configs/{llm}_it.yaml", f"{ROOT}/configs/models/{tower}.yaml"]
    file.write_text(f"base: {bases}\n")
    config = load_config(file)
    check_config(config)
    assert (config.model.vision.image_size // config.model.vision.patch_size) ** 2 == rows
    shapes = mcore_shapes(model_table(config.model))
    tower_shapes = [shape for key, shape in shapes.items() if key.startswith("vision.")]
    assert sum(map(math.prod, tower_shapes)) == parameters
    assert f"tiles of {rows} rows" in describe(config, 1)
