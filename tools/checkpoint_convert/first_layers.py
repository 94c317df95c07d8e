"""The first layers of an export and of its checkpoint, for checks within the converter's memory.

Beside the first layers of tower and language model these are the projector and some rows of the
vocabulary. Only their tensors are read, one at a time.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from dattn_mcore.architectures.tables import model_table
from dattn_mcore.checkpoint.state import model_state
from dattn_mcore.config.schema import Config
from dattn_mcore.models.dattn import DattnModel
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint
from tools.checkpoint_convert.safetensors_folder import SafetensorsFolder, SafetensorsWriter
from tools.checkpoint_convert.tables import hf_shapes

LAYERS, VOCABULARY = 2, 4096  # layers of tower and language model each, rows of the vocabulary
VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class FirstLayers:
    """A part of a model.

    Attributes:
        config: the trainer's, with the sizes of this part.
        vocabulary: int64, its rows of the vocabulary, in their order.
    """

    config: Config
    vocabulary: Tensor


def first_layers(config: Config, prompt: Tensor, image_token: int) -> FirstLayers:
    """The first layers of a model, and the prompt's words among others.

    Args:
        config: the trainer's.
        prompt: int64 ids that the vocabulary must hold.
        image_token: no word, even where it has a row of its own: it must not be generated.
    """
    model = config.model
    llm, vision = model.llm, model.vision
    known = prompt[prompt != image_token]
    others = torch.linspace(0, llm.vocab_size - 1, VOCABULARY - known.numel()).long()
    vocabulary = torch.cat([known, others]).unique()
    vocabulary = vocabulary[vocabulary != image_token]
    unread = -1 - vision.select_layer  # layers of the tower that nobody runs
    model = replace(
        model,
        llm=replace(llm, num_layers=min(LAYERS, llm.num_layers), vocab_size=len(vocabulary)),
        vision=replace(vision, num_layers=min(LAYERS + unread, vision.num_layers)),
    )
    return FirstLayers(replace(config, model=model), vocabulary)


def renumbered(ids: Tensor, vocabulary: Tensor) -> Tensor:
    """Ids as places in a part of the vocabulary; what is none of its words comes behind it."""
    place = torch.searchsorted(vocabulary, ids).clamp(max=len(vocabulary) - 1)
    return torch.where(vocabulary[place] == ids, place, torch.full_like(ids, len(vocabulary)))


def write_first_layers(folder: Path, target: Path, part: FirstLayers) -> None:
    """Writes the first layers of an export, with its own code, as a small export.

    Args:
        folder: the whole export.
        target: an empty folder.
        part: what to write.
    """
    exported = SafetensorsFolder(folder)
    shapes = hf_shapes(model_table(part.config.model))
    announced = {name: (shape, exported.dtypes[name]) for name, shape in shapes.items()}
    with SafetensorsWriter(target, announced, max_shard_bytes=5_000_000_000) as writer:
        for name, shape in shapes.items():
            tensor = exported.read(name)
            # Nothing but the vocabulary has another shape in fewer layers.
            writer.add(name, tensor if tuple(tensor.shape) == shape else tensor[part.vocabulary])
        writer.close(shapes)
    for file in (*folder.glob("*.py"), folder / "generation_config.json"):
        shutil.copyfile(file, target / file.name)
    model = part.config.model
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = settings["text_config"]
    text |= {"num_hidden_layers": model.llm.num_layers, "vocab_size": model.llm.vocab_size}
    text["pad_token_id"] = settings["pad_token_id"] = None
    if text.get("layer_types"):
        text["layer_types"] = text["layer_types"][: model.llm.num_layers]
    settings["vision_config"]["num_hidden_layers"] = model.vision.num_layers
    settings["image_token_id"] = model.llm.vocab_size
    (target / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_first_layers(
    model: DattnModel,
    groups: ProcessGroupCollection,
    source: DistCheckpoint,
    part: FirstLayers | None,
) -> None:
    """Fills a model of the size of `part` from a checkpoint of the whole one.

    Args:
        model: the trainer's, on one process.
        groups: its process groups.
        source: the checkpoint.
        part: what the model holds of it; None: all.
    """
    with torch.no_grad():
        for entry in model_state([model], groups)["model0"].values():
            shards = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
            for shard in shards:
                if isinstance(shard, ShardedTensor):
                    _load(shard, source, part)


def _load(shard: ShardedTensor, source: DistCheckpoint, part: FirstLayers | None) -> None:
    leading = shard.prepend_axis_num
    value = source.read(shard.key, shard.global_offset[0] if leading else None)
    if part is not None and shard.key in VOCABULARY_KEYS:
        value = value[part.vocabulary]
        padding = shard.global_shape[0] - len(value)
        value = torch.cat([value, value.new_zeros(padding, value.shape[1])])
    offset = shard.global_offset[leading:]
    for axis, (start, length) in enumerate(zip(offset, shard.data.shape, strict=True)):
        value = value.narrow(axis, start, length)
    shard.data.copy_(value)
