"""Hugging Face folders to Megatron-Core checkpoint: an export, or a language model and a tower."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from torch import Tensor

from dattn_mcore.architectures import language_model, vision_tower
from dattn_mcore.architectures.parameters import Entry, Shape, in_order_of_layers
from dattn_mcore.architectures.projector import projector_table
from dattn_mcore.architectures.tables import language_table, model_table, tower_table
from dattn_mcore.checkpoint.mixing import join
from dattn_mcore.config.load import from_dict, to_dict
from dattn_mcore.config.schema import (
    AttentionConfig,
    Config,
    DataConfig,
    LlmConfig,
    ModelConfig,
    ProjectorConfig,
)
from dattn_mcore.errors import CheckpointError
from dattn_mcore.hf import DattnConfig
from dattn_mcore.hf.image_rules_dattn import OLD_RULES, ImageRules
from tools.checkpoint_convert.atomic_folder import AtomicFolder, check_free
from tools.checkpoint_convert.configs import from_hf, understanding, with_features
from tools.checkpoint_convert.dist_checkpoint import write_checkpoint
from tools.checkpoint_convert.raw_folders import (
    PROCESSORS,
    check_fits,
    open_language_model,
    open_projector,
    open_vision_tower,
    pixel_statistics,
    read_json,
    text_config,
    vision_config,
)
from tools.checkpoint_convert.safetensors_folder import SafetensorsFolder
from tools.checkpoint_convert.streaming import Planned
from tools.checkpoint_convert.tables import check_keys, hf_shapes
from tools.checkpoint_convert.workers import Progress


class Source(Protocol):
    """Tensors by the names of an export."""

    dtypes: dict[str, torch.dtype]

    def read(self, name: str) -> Tensor:
        """Reads one tensor; called from several threads."""


def read_hf_config(folder: Path) -> DattnConfig:
    """Reads config.json of an exported folder, without running code from it.

    Raises:
        CheckpointError: it is missing, no JSON, malformed, or of another model type.
    """
    file = folder / "config.json"
    fields = read_json(file)
    kind = fields.get("model_type")
    if kind != "dattn":
        raise CheckpointError(f"{file}: model_type is {kind!r}; only 'dattn' folders are converted")
    with understanding(file):
        return DattnConfig.from_dict(with_features(fields))


def read_model(folder: Path, vocab_pad_multiple: int) -> tuple[ModelConfig, AttentionConfig]:
    """The trainer's configuration of an exported folder.

    Raises:
        CheckpointError: config.json is missing, malformed, or of a model that cannot be trained.
    """
    with understanding(folder / "config.json"):
        model, attention = from_hf(read_hf_config(folder), vocab_pad_multiple)
        from_dict({"model": asdict(model)})  # every setting is of its kind
    return model, attention


def convert(
    folder: str | Path,
    output: str | Path,
    vocab_pad_multiple: int = 128,
    progress: Progress = lambda done, total: None,
    processes: int = 1,
) -> None:
    """Writes a checkpoint that a run can start from (`checkpoint.init_from`).

    Args:
        folder: exported folder.
        output: checkpoint folder to make.
        vocab_pad_multiple: the embedding gets zero rows up to a multiple of this.
        progress: called after every tensor with bytes done and in all.
        processes: how many share the work.

    Raises:
        CheckpointError: the folder is damaged or of another model, or the output exists.
    """
    folder = Path(folder)
    model, attention = read_model(folder, vocab_pad_multiple)
    source = SafetensorsFolder(folder)
    table = model_table(model)
    check_keys(str(folder), hf_shapes(table), source.shapes, source.dtypes)
    config = Config(
        model=model,
        attention=attention,
        data=replace(
            image_settings(folder),
            template=language_model(model.family).chat.name,
            tokenizer=str(folder.resolve()),
            prepare="none",
        ),
    )
    plan = planned(table, source, str(folder))
    with AtomicFolder(output) as temporary:
        write_checkpoint(temporary, plan, config, progress, processes)


def convert_parts(
    llm: str | Path,
    vision: str | Path,
    config: Config,
    output: str | Path,
    progress: Progress = lambda done, total: None,
    processes: int = 1,
) -> None:
    """Writes a checkpoint from a language model and a tower; the projector starts afresh.

    Args:
        llm: Hugging Face folder of a language model.
        vision: Hugging Face folder of a vision tower, or of a model that has it.
        config: of the run that will start from it; its seed makes the projector. Where it leaves
            `data.tokenizer` at the embedded task's, the language model's own is meant.
        output: checkpoint folder to make.
        progress: called after every tensor with bytes done and in all.
        processes: how many share the work.

    Raises:
        CheckpointError: a folder is damaged or of another model, or the output exists.
    """
    llm, vision, model = Path(llm), Path(vision), config.model
    check_free(output)
    config = with_own_tokenizer(config, llm)
    check_fits(llm, vision, model, config.data)
    plan: list[Planned] = []
    tower = open_vision_tower(vision, model.vision)
    table = tower_table(model)
    check_keys(str(vision), hf_shapes(table), tower.shapes, tower.dtypes)
    plan += planned(table, tower, str(vision))
    language = open_language_model(llm, model.llm.tie_embeddings)
    table = language_table(model)
    check_keys(str(llm), hf_shapes(table), language.shapes, language.dtypes)
    plan += planned(table, language, str(llm))
    dtype = next(iter(language.dtypes.values()))
    plan += projector_of(config, dtype, llm if llm == vision else None)
    with AtomicFolder(output) as temporary:
        write_checkpoint(temporary, plan, config, progress, processes)


def with_own_tokenizer(config: Config, llm: str | Path) -> Config:
    """The configuration with the language model's tokenizer, where it names the embedded task's."""
    if config.data.tokenizer != DataConfig().tokenizer:
        return config
    own = replace(config.data, tokenizer=str(Path(llm).resolve()), prepare="none")
    return replace(config, data=own)


def config_of_parts(llm: str | Path, vision: str | Path, select_layer: int) -> Config:
    """The model that a language model and a tower make, with sizes as their folders say.

    Args:
        llm: Hugging Face folder of a language model.
        vision: Hugging Face folder of a vision tower, or of a model that has it.
        select_layer: of the tower: -1, all layers; -2, without the last.

    Raises:
        CheckpointError: a folder is damaged, or of a model that cannot be trained.
    """
    llm, vision = Path(llm), Path(vision)
    family, text = text_config(llm)
    width = text.hidden_size  # of the projector: as wide, as in LLaVA-1.5
    model = ModelConfig(
        family=family,
        llm=replace(text, vocab_pad_multiple=LlmConfig.vocab_pad_multiple),
        vision=vision_config(vision, select_layer),
        projector=ProjectorConfig(ffn_hidden_size=width),
    )
    data: dict[str, Any] = {"template": language_model(family).chat.name, "prepare": "none"}
    record = vision_tower(model.vision.kind)
    data |= {"image_mean": list(record.image_mean), "image_std": list(record.image_std)}
    data |= pixel_statistics(vision)
    return replace(from_dict({"data": data}), model=model)


def model_yaml(config: Config) -> str:
    """The settings of a model as a YAML file that a run's own names under `base:`."""
    tree = to_dict(config)
    sections = ("family", "visual_positions", "llm", "vision", "projector")
    names = ("image_mean", "image_std", "tokenizer", "prepare")
    kept = {
        "model": {name: tree["model"][name] for name in sections},
        "data": {name: tree["data"][name] for name in names},
    }
    return yaml.safe_dump(kept, sort_keys=False)


def planned(table: list[Entry], source: Source, where: str) -> list[Planned]:
    """The Megatron-Core tensors of a table, each made from its source when it is written.

    Raises:
        CheckpointError: tensors that exist on the Hugging Face side only are not zero.
    """
    plan = []
    for entry, layer in in_order_of_layers(table):  # as published files are laid out
        names = entry.names(layer)
        if entry.key is None:
            if any(source.read(name).any() for name in names):
                raise CheckpointError(
                    f"{where}: {', '.join(names)} must be zeros, because "
                    "model.visual_positions is false"
                )
            continue
        shape = entry.layer_shape()
        make = functools.partial(_make, entry, source, names)
        dtype = source.dtypes[names[0]]
        plan.append(Planned(entry.key, layer, entry.layers, shape, dtype, make))
    return plan


def _make(entry: Entry, source: Source, names: list[str]) -> Tensor:
    return join(entry, [source.read(name) for name in names])


def projector_of(config: Config, dtype: torch.dtype, folder: Path | None) -> list[Planned]:
    """The projector with the weights that a run with this seed would start from.

    Args:
        config: the run.
        dtype: of all but row and column positions, which are float32.
        folder: of a model of images and text, whose two linears are taken if it has them.

    Raises:
        CheckpointError: they have other shapes.
    """
    taken = None if folder is None else open_projector(folder)
    shapes = {} if taken is None else taken.shapes
    _check_projector(config, shapes, folder)
    from dattn_mcore.models.initialize import initial_value

    def make(entry: Entry, dtype: torch.dtype) -> Tensor:
        value = initial_value(entry, layer=0, model=config.model, seed=config.train.seed)
        return (torch.ones(entry.mcore_shape()) if value is None else value).to(dtype)

    plan = []
    for entry in projector_table(config.model):
        assert entry.key is not None
        kind = torch.float32 if entry.dtype == "float32" else dtype
        lazily = functools.partial(make, entry, kind)
        if taken is not None and entry.parts.keys() <= shapes.keys():
            (name,) = entry.parts
            kind, lazily = taken.dtypes[name], functools.partial(taken.read, name)
        plan.append(Planned(entry.key, None, None, entry.mcore_shape(), kind, lazily))
    return plan


def _check_projector(config: Config, shapes: Mapping[str, Shape], folder: Path | None) -> None:
    for entry in projector_table(config.model):
        for name, shape in entry.parts.items():
            if shapes.get(name, shape) != shape:
                raise CheckpointError(
                    f"{folder}: {name} is {list(shapes[name])}, but "
                    f"model.projector.ffn_hidden_size={config.model.projector.ffn_hidden_size} and "
                    f"the tower need {list(shape)}; set the width that it has, or give --llm and "
                    "--vision different folders, and the projector starts anew"
                )


def image_settings(folder: Path) -> DataConfig:
    """Image policy and rules, AnyRes grids, mean and standard deviation of a folder's processor.

    A processor that names no rules is of before there was a choice.

    Raises:
        CheckpointError: there is no processor, or its file is malformed.
    """
    for name in PROCESSORS:
        if (folder / name).is_file():
            fields = read_json(folder / name)
            break
    else:
        raise CheckpointError(f"{folder} has no processor_config.json; give an exported folder")
    with understanding(folder / name):
        fields = fields.get("image_processor", fields)
        policy = (
            "pad" if fields.get("do_pad") else "crop" if fields.get("do_center_crop") else "stretch"
        )
        mean: Any = tuple(float(x) for x in fields["image_mean"])
        std: Any = tuple(float(x) for x in fields["image_std"])
        grids: Any = DataConfig().anyres_grids
        rules = {name: fields.get(name, old) for name, old in asdict(OLD_RULES).items()}
        if fields.get("image_processor_type") == "DattnImageProcessor":
            policy = str(fields["image_policy"])
            grids = tuple((int(columns), int(rows)) for columns, rows in fields["anyres_grids"])
        ImageRules(**rules)  # refuses what is unknown
        data = {"image_policy": policy, "anyres_grids": grids, "image_mean": mean, "image_std": std}
        return from_dict({"data": {**data, **rules}}).data
