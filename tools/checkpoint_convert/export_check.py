"""Loads an export as its users do, and compares it with the trainer and with itself.

Compared are the picture that its processor makes of an image, the logits of a prompt with that
image, and generation with and without the cache. All in float32: weights of bf16 widen exactly, so
what differs is the order of sums. Of a large model the first layers are compared, with a part of
the vocabulary; only their tensors are read.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from megatron.core.process_groups_config import ProcessGroupCollection
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from dattn_mcore.architectures.tables import model_table
from dattn_mcore.config.schema import Config, LoraConfig
from dattn_mcore.data.batch import MicroBatch
from dattn_mcore.data.image_rules import rules_of
from dattn_mcore.data.resize import to_tiles
from dattn_mcore.data.tiles import ANYRES_POLICIES
from dattn_mcore.evaluation.self_check import (
    BOUND,
    NEW_TOKENS,
    Agreement,
    SelfCheckError,
    compare_generation,
    saying_versions,
    spread_difference,
)
from dattn_mcore.hf.image_rules_dattn import ORIENTATION, to_rgb
from dattn_mcore.models.dattn import DattnModel
from dattn_mcore.types import IGNORED_LABEL, IMAGE_MARK, image_shapes
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint
from tools.checkpoint_convert.first_layers import (
    LAYERS,
    FirstLayers,
    first_layers,
    load_first_layers,
    renumbered,
    write_first_layers,
)
from tools.checkpoint_convert.logits import load_model, trainer_logits
from tools.checkpoint_convert.tables import hf_shapes

QUESTION = f"{IMAGE_MARK}\nWhich digit is in the top-left cell?"
WHOLE = 50_000_000  # parameters up to which the whole model is compared
GREY_LEVELS = 2  # torch's resizing and Pillow's differ by so much
OWN_CODE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": True}
WAY_OUT = ", or write the folder unchecked with --no-check"


@dataclass(frozen=True)
class Prompt:
    """The question and its picture, as the folder's processor makes them.

    Attributes:
        inputs: of the model.
        image_column: where the image stands in the ids.
        tiles: uint8 [tiles, 3, size, size], the pixels before they were normalised.
        levels: grey levels by which they differ from training's at most.
    """

    inputs: dict[str, Tensor]
    image_column: int
    tiles: Tensor
    levels: int


def check_export(folder: Path, source: DistCheckpoint, name: str) -> str:
    """Checks an export against the checkpoint that it was made of, and against itself.

    It is the folder's own code that is loaded, unless `dattn_mcore.hf.register` was called here.

    Args:
        folder: the export.
        source: the checkpoint.
        name: what messages call the export.

    Returns:
        One line that says what was compared, and how far it lay apart.

    Raises:
        SelfCheckError: they differ; one line with both versions and the tested range.
    """
    started = time.monotonic()
    transformers_logging.disable_progress_bar()
    config = source.config
    sizes = hf_shapes(model_table(config.model)).values()
    whole = sum(map(math.prod, sizes)) <= WHOLE
    with saying_versions(name, WAY_OUT):
        prompt = _prompt(folder, config)
        ids = prompt.inputs["input_ids"][0]
        part = None if whole else first_layers(config, ids, int(ids[prompt.image_column]))
        agreement = _by_export(folder, part, prompt)
        expected = _by_trainer(source, part, prompt, agreement)
        is_text = torch.arange(len(agreement.sequence)) != prompt.image_column
        difference = spread_difference(agreement.logits[is_text], expected)
        if not difference <= BOUND:
            raise SelfCheckError(
                f"on a prompt with an image its logits are off the trainer's by {difference:.2g} "
                f"of their spread (bound {BOUND:.0e})"
            )
    what = "" if whole else f"the first {LAYERS} layers of "
    return (
        f"checked {what}the export with transformers {transformers.__version__} in "
        f"{time.monotonic() - started:.1f} s: on a prompt with an image {len(expected)} rows of "
        f"logits differ from the trainer's by {difference:.1g} of their spread at most (bound "
        f"{BOUND:.0e}), {NEW_TOKENS} tokens generated with and without the cache by "
        f"{agreement.difference:.1g}, and the picture by {prompt.levels} of 255 grey levels"
    )


def make_picture(config: Config) -> Image.Image:
    """A smooth picture, which all ways of resizing treat alike, of as few tiles as there can be."""
    size, data = config.model.vision.image_size, config.data
    columns, rows = 1.5, 1.0
    if data.image_policy in ANYRES_POLICIES:
        columns, rows = min(data.anyres_grids, key=math.prod)
    width, height = int(columns * size), int(rows * size)
    y, x = np.mgrid[0:height, 0:width]
    waves = [2 * x / width, 1.5 * y / height, x / width + 2 * y / height]
    channels = [127.5 + 100 * np.sin(math.pi * wave + shift) for shift, wave in enumerate(waves)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def _prompt(folder: Path, config: Config) -> Prompt:
    """The question and its picture through the folder's processor.

    Raises:
        SelfCheckError: the picture is not training's.
    """
    picture = make_picture(config)
    processor: Any = AutoProcessor.from_pretrained(folder, **OWN_CODE)
    chat = [{"role": "user", "content": QUESTION}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = dict(processor(text=[text], images=[picture], return_tensors="pt"))
    tiles = _tiles(inputs, config)
    levels = max(
        _compare_pictures(tiles, picture, config), _compare_file(processor, picture, config)
    )
    (column,) = (inputs["input_ids"][0] == processor.image_token_id).nonzero()[:, 0].tolist()
    return Prompt(inputs, column, tiles, levels)


def _tiles(inputs: dict[str, Tensor], config: Config) -> Tensor:
    """The processor's uint8 tiles [tiles, 3, size, size], before it normalised them.

    Raises:
        SelfCheckError: they are no grey levels, so mean or standard deviation are others.
    """
    mean, std = (torch.tensor(x) for x in (config.data.image_mean, config.data.image_std))
    levels = (inputs["pixel_values"].float() * std[:, None, None] + mean[:, None, None]) * 255
    tiles = levels.round()
    off = float((levels - tiles).abs().max())
    if not (off < 0.01 and tiles.min() >= 0 and tiles.max() <= 255):
        raise SelfCheckError("its processor normalises pictures otherwise than training did")
    return tiles.to(torch.uint8)


def _compare_file(processor: Any, picture: Image.Image, config: Config) -> int:
    """The same of a file that lies on its side and is half transparent, given by its path.

    Raises:
        SelfCheckError: as `_compare_pictures`.
    """
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    lying = picture.transpose(Image.Transpose.ROTATE_90)
    lying.putalpha(lying.convert("L"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        lying.save(path, exif=exif)
        inputs = dict(processor.image_processor(images=[str(path)], return_tensors="pt"))
        with Image.open(path) as opened:
            return _compare_pictures(_tiles(inputs, config), opened, config)


def _compare_pictures(tiles: Tensor, picture: Image.Image, config: Config) -> int:
    """The largest difference in grey levels between the processor's tiles and training's.

    Raises:
        SelfCheckError: it is larger than that of two ways of resizing.
    """
    data, size = config.data, config.model.vision.image_size
    fill = tuple(int(channel * 255) for channel in data.image_mean)
    rules = rules_of(data)
    image = torch.from_numpy(np.asarray(to_rgb(picture, rules)).copy()).permute(2, 0, 1)
    ties = rules.anyres_ties
    ours = to_tiles(image, size, data.image_policy, fill, data.anyres_grids, ties)
    if ours.shape != tiles.shape:
        raise SelfCheckError(
            f"its processor makes tiles {list(tiles.shape)} of a picture and training "
            f"{list(ours.shape)}"
        )
    levels = int((ours.int() - tiles.int()).abs().max())
    if levels > GREY_LEVELS:
        raise SelfCheckError(
            f"its processor's picture is off training's by {levels} grey levels (bound "
            f"{GREY_LEVELS})"
        )
    return levels


def _by_export(folder: Path, part: FirstLayers | None, prompt: Prompt) -> Agreement:
    """Loads a folder with its own code, and compares generation with and without the cache.

    Args:
        folder: the export.
        part: of it that is loaded; None: all.
        prompt: what is asked.

    Raises:
        SelfCheckError: weights are missing or too many, or generation contradicts itself.
    """
    if part is None:
        return compare_generation(_load(folder), prompt.inputs)
    ids = renumbered(prompt.inputs["input_ids"], part.vocabulary)
    with tempfile.TemporaryDirectory(dir=folder, prefix="first_layers_") as scratch:
        write_first_layers(folder, Path(scratch), part)
        return compare_generation(_load(Path(scratch)), {**prompt.inputs, "input_ids": ids})


def _load(folder: Path) -> Any:
    model: Any
    loaded: Any
    model, loaded = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **OWN_CODE
    )
    problems = [
        f"{len(loaded[kind])} {kind.replace('_', ' ')}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if loaded[kind]
    ]
    if problems:
        raise SelfCheckError(f"its weights do not fit its configuration ({', '.join(problems)})")
    return model.eval()


def _by_trainer(
    source: DistCheckpoint, part: FirstLayers | None, prompt: Prompt, agreement: Agreement
) -> Tensor:
    """The trainer's logits [text rows, vocabulary] of the prompt and of what was generated."""
    config = source.config if part is None else replace(part.config, lora=LoraConfig())
    before, tiles = prompt.image_column, prompt.tiles
    ids = torch.cat([agreement.sequence[:before], agreement.sequence[before + 1 :]])
    rows = config.model.vision.rows_per_tile * len(tiles)
    runs = ((False, before), (True, rows), (False, len(ids) - before))
    grids = prompt.inputs.get("image_grids", torch.zeros(1, 2, dtype=torch.long))
    batch = MicroBatch(
        layouts=(tuple(run for run in runs if run[1]),),
        text_ids=ids,
        labels=torch.full_like(ids, IGNORED_LABEL),
        num_tiles=len(tiles),
        tiles=tiles,
        sample_ids=("self-check",),
        num_samples=1,
        items=image_shapes(grids.tolist()),
    )

    def load(config: Config, model: DattnModel, groups: ProcessGroupCollection) -> None:
        if part is None and not source.ema:
            load_model(source, config, model, groups)
        else:
            load_first_layers(model, groups, source, part)

    return trainer_logits(config, batch, load)
