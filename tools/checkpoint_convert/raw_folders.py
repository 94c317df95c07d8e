"""A language model's and a vision tower's own folders, read under the names of an export.

Older transformers wrote towers as `vision_model.*`, newer ones without it; a folder may also hold
the whole model of images and text. What the tower does not use is left out by rule, by name, never
silently because it did not fit.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from dattn_mcore.architectures import language_models, nested, vision_tower, vision_towers
from dattn_mcore.architectures.decoder import HEAD, PREFIX
from dattn_mcore.architectures.parameters import PROJECTOR, TOWER, Shape
from dattn_mcore.architectures.refused import why_refused, why_tower_refused
from dattn_mcore.config.export_rules import as_yaml
from dattn_mcore.config.schema import DataConfig, LlmConfig, ModelConfig, VisionConfig
from dattn_mcore.errors import CheckpointError
from tools.checkpoint_convert.configs import text_from_hf, understanding, vision_from_hf
from tools.checkpoint_convert.safetensors_folder import SafetensorsFolder

TEXT_TYPES = tuple(record.model_type for record in language_models().values())
# Model types of folders that hold a tower, with that of the tower itself.
VISION_TYPES = {
    kind: record.model_type for record in vision_towers().values() for kind in record.folder_types
}
# Files with the settings of images; release 5 of transformers writes the first.
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
EMBEDDING = "embed_tokens.weight"
# Of a model of images and text: what is no part of its tower.
NOT_THE_TOWER = (
    "text_model.",
    "logit_scale",
    "logit_bias",
    "visual_projection.",
    "text_projection.",
)


class RawFolder:
    """One folder whose tensors go by the names of an export.

    Attributes:
        folder: what was read.
        shapes: shape by exported name.
        dtypes: dtype by exported name.
        ignored: names in the folder that are left out by rule.
    """

    def __init__(self, folder: Path, source: SafetensorsFolder, names: dict[str, str]) -> None:
        self.folder, self._source, self._names = folder, source, names
        self.shapes: dict[str, Shape] = {ours: source.shapes[raw] for ours, raw in names.items()}
        self.dtypes: dict[str, torch.dtype] = {
            ours: source.dtypes[raw] for ours, raw in names.items()
        }
        taken = set(names.values())
        self.ignored = [raw for raw in source.shapes if raw not in taken]

    def read(self, name: str) -> Tensor:
        """Reads one tensor by its exported name."""
        return self._source.read(self._names[name])


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        fields.get("")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({' '.join(str(error).split())}); give a folder of Hugging Face"
        ) from None
    return fields


def is_nested(fields: dict[str, Any]) -> bool:
    """Whether a config.json is of a model of images and text whose parts can be taken."""
    return str(fields.get("model_type")) in nested.MODEL_TYPES


def text_config(folder: Path) -> tuple[str, LlmConfig]:
    """Family and sizes of a language model's folder.

    Raises:
        CheckpointError: config.json is missing, or of a model that cannot be trained here.
    """
    whole = fields = read_json(folder / "config.json")
    if is_nested(whole):
        fields = dict(whole.get("text_config") or {})
    if quantized := whole.get("quantization_config") or fields.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise CheckpointError(
            f"{folder / 'config.json'}: weights are quantized (quantization_config: {method}); "
            "give the model's folder in bf16"
        )
    kind = fields.get("model_type")
    if kind not in TEXT_TYPES:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is {kind!r} ({why_refused(fields)}); a language "
            f"model must be one of {', '.join(TEXT_TYPES)}"
        )
    fields.pop("model_type")
    with understanding(folder / "config.json"):
        if is_nested(whole) and _tied_as_a_whole(folder, whole):
            fields["tie_word_embeddings"] = True
        return text_from_hf(AutoConfig.for_model(kind, **fields), 1)


def _tied_as_a_whole(folder: Path, fields: dict[str, Any]) -> bool:
    """Whether a model of images and text has no head of its own, whatever `text_config` says.

    transformers ties by the outer setting, which some architectures have on, and writes no head.
    """
    others = {name: value for name, value in fields.items() if name != "model_type"}
    config = AutoConfig.for_model(fields["model_type"], **others)
    if not config.tie_word_embeddings:
        return False
    # A folder of settings alone has no weights that could say otherwise.
    names = SafetensorsFolder(folder).shapes if any(folder.glob("*.safetensors*")) else ()
    return not any(head in names for head in nested.HEADS)


def vision_config(folder: Path, select_layer: int) -> VisionConfig:
    """Sizes of a tower's folder.

    Raises:
        CheckpointError: config.json is missing, or of another architecture.
    """
    fields = read_json(folder / "config.json")
    if is_nested(fields):
        fields = dict(fields.get("vision_config") or {})
    kind = str(fields.get("model_type"))
    if kind not in VISION_TYPES:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is {kind!r} ({why_tower_refused(fields)}); a "
            f"tower must be one of {', '.join(VISION_TYPES)}"
        )
    with understanding(folder / "config.json"):
        fields = dict(fields.get("vision_config", fields))
        inner = fields.pop("model_type", VISION_TYPES[kind])
        if inner != VISION_TYPES[kind]:
            raise CheckpointError(
                f"{folder / 'config.json'}: model_type is {inner!r}, and no vision_config is "
                f"{VISION_TYPES[kind]!r}, as in folders of a publisher's own code; give one that "
                "transformers' own class loads"
            )
        return vision_from_hf(AutoConfig.for_model(inner, **fields), select_layer)


def pixel_statistics(folder: Path) -> dict[str, Any]:
    """`image_mean` and `image_std` of a tower's folder, where its processor's files say them.

    Raises:
        CheckpointError: such a file is malformed.
    """
    found: dict[str, Any] = {}
    for file in (folder / name for name in PROCESSORS):
        if file.is_file():
            with understanding(file):
                fields = read_json(file)
                fields = fields.get("image_processor") or fields
                said = {name: fields.get(name) for name in ("image_mean", "image_std")}
                found = {name: value for name, value in said.items() if value is not None} | found
    return found


def open_language_model(folder: Path, tied: bool) -> RawFolder:
    """Opens a language model's folder.

    Raises:
        CheckpointError: a file is missing or damaged, or `tied` and the head differs from the
            embedding.
    """
    source = SafetensorsFolder(folder)
    prefixes: tuple[str, ...] = ("model.",)
    heads: tuple[str, ...] = (HEAD,)
    others: tuple[str, ...] = ()
    if is_nested(read_json(folder / "config.json")):
        prefixes, heads = nested.LANGUAGE, nested.HEADS
        others = (*nested.TOWER, *nested.PROJECTOR, *nested.OTHERS)
    names = {}
    for raw in source.shapes:
        if raw.endswith(".rotary_emb.inv_freq"):  # a constant that old releases saved
            continue
        inner = nested.without_prefix(raw, prefixes)
        if inner is not None:
            names[PREFIX + inner] = raw
        elif not raw.startswith(others):
            names[HEAD if raw in heads else raw] = raw
    head, embedding = names.get(HEAD), names.get(f"{PREFIX}{EMBEDDING}")
    if tied and head is not None:
        if embedding is not None and not same_bits(source.read(head), source.read(embedding)):
            raise CheckpointError(
                f"{folder}: {head} differs from {embedding}, but the model ties them; give the "
                "weights of the published model"
            )
        del names[HEAD]
    return RawFolder(folder, source, names)


def open_vision_tower(folder: Path, vision: VisionConfig) -> RawFolder:
    """Opens a tower's folder, or that of a model with its tower in it, up to the selected layer.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    source = SafetensorsFolder(folder)
    towers = {raw: raw for raw in source.shapes if not raw.startswith(NOT_THE_TOWER)}
    if is_nested(read_json(folder / "config.json")):
        inside = {raw: nested.without_prefix(raw, nested.TOWER) for raw in source.shapes}
        towers = {raw: name for raw, name in inside.items() if name is not None}
    prefix = "vision_model."
    prefix = prefix if any(name.startswith(prefix) for name in towers.values()) else ""
    names = {}
    for raw, name in towers.items():
        inner = name.removeprefix(prefix)
        if not _unread(inner, vision):
            names[raw if prefix and inner == name else TOWER + inner] = raw
    return RawFolder(folder, source, names)


def open_projector(folder: Path) -> RawFolder | None:
    """Opens the projector of a model of images and text; None where the folder is another's.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    if not is_nested(read_json(folder / "config.json")):
        return None
    source = SafetensorsFolder(folder)
    inside = {raw: nested.without_prefix(raw, nested.PROJECTOR) for raw in source.shapes}
    names = {PROJECTOR + name: raw for raw, name in inside.items() if name is not None}
    return RawFolder(folder, source, names)


def _unread(name: str, vision: VisionConfig) -> bool:
    """Whether the model never reads this tensor of a tower."""
    if name == "embeddings.position_ids" or name.startswith("head."):  # a pooling head
        return True
    record = vision_tower(vision.kind)
    if name.startswith(f"{record.names.final_norm}."):  # may be for the pooled row only
        return not record.features.final_norm or vision.select_layer != -1
    layer = re.match(rf"{re.escape(record.names.layers)}\.(\d+)\.", name)
    return layer is not None and vision.layers_run <= int(layer[1]) < vision.num_layers


def check_fits(llm: Path, vision: Path, model: ModelConfig, data: DataConfig) -> None:
    """Checks that both folders are of the configured model.

    Raises:
        CheckpointError: naming every setting that differs.
    """
    family, text = text_config(llm)
    problems = []
    if family != model.family:
        problems.append(f"model.family is {family!r} in {llm} and {model.family!r}")
    unread = ("init_std", "vocab_pad_multiple")
    problems += _differences("model.llm", llm, text, model.llm, unread)
    tower = vision_config(vision, model.vision.select_layer)
    problems += _differences("model.vision", vision, tower, model.vision, ("init_std",))
    for name, theirs in pixel_statistics(vision).items():
        ours = list(getattr(data, name))
        if theirs != ours:
            problems.append(f"data.{name} is {theirs} in {vision} and {ours}")
    if problems:
        raise CheckpointError(
            f"{'; '.join(problems)} in --config; give the folders that --config was written for"
        )


def _differences(
    section: str, where: Path, theirs: Any, ours: Any, free: tuple[str, ...]
) -> list[str]:
    problems = []
    for name in vars(ours):
        found, expected = getattr(theirs, name), getattr(ours, name)
        if name == "query_scale":
            found, expected = found or theirs.head_dim, expected or ours.head_dim
        if name == "layer_pattern":  # several patterns may mean the same
            found, expected = theirs.windows, ours.windows
        if found != expected and name not in free:
            if dataclasses.is_dataclass(found):
                found, expected = as_yaml(found), as_yaml(expected)
            problems.append(f"{section}.{name} is {found} in {where} and {expected}")
    return problems


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are the same to the last bit (a NaN equals itself, 0 is not -0)."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    as_bytes = (t.contiguous().reshape(-1).view(torch.uint8) for t in (first, second))
    return torch.equal(*as_bytes)
