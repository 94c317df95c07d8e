"""What a checkpoint or an exported folder holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dattn_mcore.architectures.adapters import adapter_table
from dattn_mcore.architectures.parameters import Shape
from dattn_mcore.architectures.tables import language_table, model_table, tower_table
from dattn_mcore.config.lora import adapters_of
from dattn_mcore.config.schema import AttentionConfig, ModelConfig
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint
from tools.checkpoint_convert.hf_to_mcore import read_model
from tools.checkpoint_convert.raw_folders import TEXT_TYPES, VISION_TYPES, read_json
from tools.checkpoint_convert.safetensors_folder import SafetensorsFolder
from tools.checkpoint_convert.tables import check_keys, hf_shapes, mcore_shapes
from tools.checkpoint_convert.verify import open_weights


@dataclass(frozen=True)
class Contents:
    """Findings.

    Attributes:
        kind: `Megatron-Core checkpoint`, `Hugging Face folder`, `language model` or `tower`.
        path: what was read.
        step: optimizer step; None for a Hugging Face folder.
        tensors: shape and dtype of every tensor of the model.
        other: number of other entries (optimizer state, what a tower does not use).
        attention: None for a language model or a tower alone, whose other sizes mean nothing.
    """

    kind: str
    path: Path
    step: int | None
    model: ModelConfig
    attention: AttentionConfig | None
    tensors: dict[str, tuple[Shape, torch.dtype]]
    other: int

    @property
    def parameters(self) -> int:
        """Number of parameters, vocabulary padding included."""
        return sum(torch.Size(shape).numel() for shape, _ in self.tensors.values())


def inspect(path: str | Path) -> Contents:
    """Reads headers only, and checks that every tensor of the model is there.

    Raises:
        CheckpointError: it is neither, or damaged, or incomplete.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        kind = str(read_json(path / "config.json").get("model_type"))
        if kind in TEXT_TYPES or kind in VISION_TYPES:
            return _inspect_part(path)
        model, attention = read_model(path, vocab_pad_multiple=1)
        folder = SafetensorsFolder(path)
        check_keys(str(path), hf_shapes(model_table(model)), folder.shapes, folder.dtypes)
        tensors = {name: (shape, folder.dtypes[name]) for name, shape in folder.shapes.items()}
        return Contents("Hugging Face folder", path, None, model, attention, tensors, 0)
    source = DistCheckpoint(path)
    model, attention = source.config.model, source.config.attention
    expected = mcore_shapes(model_table(model))
    adapters = adapters_of(source.config)
    if source.of_base is not None and adapters is not None:
        own = mcore_shapes(adapter_table(model, adapters))
        # Of the base there are here only the parts that learnt beside the adapters.
        expected = own | {key: shape for key, shape in expected.items() if key in source.shapes}
    check_keys(str(source.path), expected, source.shapes, source.dtypes)
    tensors = {key: (shape, source.dtypes[key]) for key, shape in source.shapes.items()}
    return Contents(
        "Megatron-Core checkpoint",
        source.path,
        source.step,
        model,
        attention,
        tensors,
        len(source.ignored),
    )


def _inspect_part(path: Path) -> Contents:
    side = open_weights(path, select_layer=-1)
    model = side.model
    table = language_table(model) if "llm" in side.parts else tower_table(model)
    check_keys(str(path), hf_shapes(table), side.shapes, side.dtypes)
    tensors = {name: (shape, side.dtypes[name]) for name, shape in side.shapes.items()}
    return Contents(side.kind, path, None, model, None, tensors, side.ignored)
