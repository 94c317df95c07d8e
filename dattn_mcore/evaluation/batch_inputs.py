"""From prompts and pictures to a model's inputs; an image that a batch shows twice is made once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from dattn_mcore.evaluation.images import rules_of_processor
from dattn_mcore.hf.samples_dattn import tiles_of


def batch_inputs(processor: Any, prompts: Sequence[str], shown: Sequence[tuple[str, Any]]) -> Any:
    """What a processor gives for a batch.

    Args:
        processor: of an exported model.
        prompts: one a question, with an `<image>` for each picture.
        shown: who asks, and the picture, in the order of their places in the prompts.

    Returns:
        input_ids and attention_mask [batch, columns], padded on the left; where there are pictures,
        pixel_values [tiles, 3, height, width] and, of AnyRes, image_grids [images, 2].

    Raises:
        DataError: an image is missing or damaged.
    """
    rules = rules_of_processor(processor.image_processor)
    opened: list[Any] = []
    place: dict[Hashable, int] = {}
    for who, picture in shown:
        if picture.key not in place:
            place[picture.key] = len(opened)
            opened.append(picture.open(who, rules))
    inputs = processor.tokenizer(
        list(prompts), padding=True, return_tensors="pt", **processor.text_defaults
    )
    if opened:
        images = processor.image_processor(images=opened, return_tensors="pt")
        inputs.update(repeated(images, [place[picture.key] for _, picture in shown]))
    return inputs


def repeated(images: Any, shown: Sequence[int]) -> dict[str, torch.Tensor]:
    """What an image processor gives, for images that are shown several times.

    Args:
        images: of each image once: pixel_values [tiles, 3, height, width] and, where an image has
            several tiles, image_grids [images, 2].
        shown: number of the image at each place.
    """
    if "image_grids" not in images:
        return {"pixel_values": images["pixel_values"][shown]}
    grids = images["image_grids"]
    tiles = images["pixel_values"].split(tiles_of(grids).tolist())
    return {
        "pixel_values": torch.cat([tiles[number] for number in shown]),
        "image_grids": grids[shown],
    }
