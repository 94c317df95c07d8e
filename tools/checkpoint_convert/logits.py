"""Logits of a small model on a fixed input: an export by transformers, a checkpoint by Megatron.

A round trip of weights cannot see a wrong norm, cap or scale; two implementations can.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from dattn_mcore.config.schema import Config, DataConfig, ParallelConfig
from dattn_mcore.hf import NO_FOREIGN_CODE
from dattn_mcore.types import IGNORED_LABEL, image_shapes
from tools.checkpoint_convert.adapted_checkpoint import AdaptedCheckpoint, open_checkpoint
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint
from tools.checkpoint_convert.hf_to_mcore import image_settings

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from dattn_mcore.data.batch import MicroBatch
    from dattn_mcore.models.dattn import DattnModel

BEFORE, AFTER = 3, 24  # text rows around the images
GRIDS = ((0, 0), (2, 1))  # canvases of the images: one tile; a base view and two tiles
TILES = sum(1 + columns * rows for columns, rows in GRIDS)


def fixed_logits(path: Path, avoid: frozenset[int]) -> Tensor:
    """Logits [text rows, vocabulary] in float32 for two fixed images and fixed ids.

    Args:
        path: export or checkpoint.
        avoid: ids that mark images in an export.
    """
    is_export = (path / "config.json").is_file()
    return _by_transformers(path, avoid) if is_export else _by_megatron(path, avoid)


def _input(vocab_size: int, image_size: int, avoid: frozenset[int]) -> tuple[Tensor, Tensor]:
    """Text ids and uint8 tiles."""
    generator = torch.Generator().manual_seed(0)
    usable = torch.tensor([i for i in range(vocab_size) if i not in avoid])
    ids = usable[torch.randint(0, len(usable), (BEFORE + AFTER,), generator=generator)]
    shape = (TILES, 3, image_size, image_size)
    return ids, torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _by_transformers(folder: Path, avoid: frozenset[int]) -> Tensor:
    from dattn_mcore.hf import DattnForConditionalGeneration

    transformers_logging.disable_progress_bar()
    model = DattnForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, **NO_FOREIGN_CODE
    ).eval()
    config = model.config
    ids, tiles = _input(config.text_config.vocab_size, config.vision_config.image_size, avoid)
    images = torch.tensor([config.image_token_id] * len(GRIDS))
    ids = torch.cat([ids[:BEFORE], images, ids[BEFORE:]])
    data: DataConfig = image_settings(folder)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (data.image_mean, data.image_std))
    with torch.no_grad():
        pixels = (tiles.float() / 255 - mean) / std
        logits = model(ids[None], pixels, image_grids=torch.tensor(GRIDS)).logits[0]
    return torch.cat([logits[:BEFORE], logits[BEFORE + len(GRIDS) :]])


def _by_megatron(path: Path, avoid: frozenset[int]) -> Tensor:
    from dattn_mcore.data.batch import MicroBatch

    source = open_checkpoint(path)
    config = source.config
    vision, vocab_size = config.model.vision, config.model.llm.vocab_size
    ids, tiles = _input(vocab_size, vision.image_size, avoid)
    rows = vision.rows_per_tile * TILES
    batch = MicroBatch(
        layouts=(((False, BEFORE), (True, rows), (False, AFTER)),),
        text_ids=ids,
        labels=torch.full_like(ids, IGNORED_LABEL),
        num_tiles=TILES,
        tiles=tiles,
        sample_ids=("fixed",),
        num_samples=1,
        items=image_shapes(GRIDS),
    )
    return trainer_logits(config, batch, functools.partial(load_model, source))


def load_model(
    source: DistCheckpoint, config: Config, model: DattnModel, groups: ProcessGroupCollection
) -> None:
    """Fills the trainer's model from a checkpoint; of adapters, the base's weights come first."""
    from dattn_mcore.checkpoint.load import load_adapters, load_weights

    if isinstance(source, AdaptedCheckpoint):
        load_weights(source.base.path, config, [model], groups)
        load_adapters(source.path, [model], groups)
    else:
        load_weights(source.path, config, [model], groups)


def trainer_logits(config: Config, batch: MicroBatch, load: Callable[..., object]) -> Tensor:
    """Logits [text rows, vocabulary] in float32 as the trainer computes them, on this process.

    Args:
        config: of the run; layout, precision and backend are chosen here.
        batch: one pack.
        load: called with the changed configuration, the model and its process groups; fills the
            model's weights.
    """
    from dattn_mcore.parallel.groups import single_process
    from dattn_mcore.training.inputs import to_model_inputs
    from dattn_mcore.training.model import build_from_config

    train = replace(config.train, precision="fp32", fp8="none", recompute="none")
    attention = replace(config.attention, backend="auto")
    config = replace(config, train=train, attention=attention, parallel=ParallelConfig())
    cpu = torch.device("cpu")
    with single_process() as groups:
        (model,) = build_from_config(config, groups, cpu, initialize=False)
        load(config, model, groups)
        inputs = to_model_inputs(batch, config, groups, cpu)
        with torch.no_grad():
            logits = model.eval()(inputs, return_logits=True)
    return logits[: len(batch.text_ids), : config.model.llm.vocab_size].float()
