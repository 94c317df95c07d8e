"""Training in plain PyTorch: one sample at a time, `torch.optim.AdamW`, no Megatron-Core.

What `benchmarks.same_curve` holds the trainer against. Nothing of `dattn_mcore` is imported here:
samples, pixels, schedule, clipping and mean are written again. Models: transformers' own
`LlavaForConditionalGeneration`, and `benchmarks.plain_dattn`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

from benchmarks import plain_dattn

IGNORED = -100  # as PyTorch has it; nothing here is imported from the project


@dataclass(frozen=True)
class Caption:
    """A sample: an image, if it has one, then the ids of <bos>, its caption and <eos>."""

    ids: Tensor  # int64 [text rows]; all but the first are to be predicted
    pixels: Tensor | None  # float32 [3, side, side], normalised

    @property
    def supervised(self) -> int:
        """Tokens with a loss."""
        return len(self.ids) - 1


@dataclass(frozen=True)
class Recipe:
    """How weights are updated; the trainer's settings of the same names."""

    steps: int
    lr: float
    min_lr_ratio: float
    warmup_ratio: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    clip_grad: float


class PlainModel(Protocol):
    """A model that is trained here."""

    def trained(self) -> Iterable[Tensor]:
        """Its parameters."""

    def loss(self, sample: Caption, of: int) -> Tensor:
        """Sum of the losses of a sample's tokens, divided by `of`."""


def read_captions(
    annotations: Path, images: Path, tokenizer: Path, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Caption]:
    """Reads a file in LLaVA's format, one caption a sample, for LLaVA's first stage.

    Args:
        annotations: the file; images are of the tower's size.
        images: folder of its images.
        tokenizer: SentencePiece file.
        mean: of the pixels in 0..1, for each channel.
        std: likewise.

    Returns:
        The samples by their ids.
    """
    pieces: Any = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))

    def pixels(name: str) -> Tensor:
        with Image.open(images / name) as image:
            values = np.asarray(image.convert("RGB"), dtype=np.float32) / np.float32(255)
        channels = (torch.tensor(x, dtype=torch.float32).view(3, 1, 1) for x in (mean, std))
        shift, scale = channels
        return (torch.from_numpy(values).permute(2, 0, 1) - shift) / scale

    found = {}
    for record in json.loads(annotations.read_text("utf-8")):
        caption = pieces.encode(record["conversations"][1]["value"])
        ids = torch.tensor([pieces.bos_id(), *caption, pieces.eos_id()])
        found[record["id"]] = Caption(ids, pixels(record["image"]) if "image" in record else None)
    return found


def draw_weights(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """Random weights: norms of about 1, small biases, and matrices that keep the scale of rows."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in sorted(shapes.items()):
        drawn = torch.randn(*shape, generator=generator)
        if "norm" in name:
            weights[name] = 0.1 * drawn + (1.0 if name.endswith("weight") else 0.0)
        elif len(shape) == 1 or "embed_tokens" in name or "position_embedding" in name:
            weights[name] = 0.1 * drawn
        else:
            weights[name] = drawn / math.sqrt(math.prod(shape[1:]))
    return weights


def perturbed(weights: Mapping[str, Tensor], relative: float, seed: int) -> dict[str, Tensor]:
    """Every weight times 1 + relative x a normal number, rounded to float32."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (w * (1 + relative * torch.randn(w.shape, generator=generator).double())).to(w.dtype)
        for name, w in sorted(weights.items())
    }


class PlainDattn:
    """D-Attn as `plain_dattn` has it.

    Args:
        weights: copied.
        sizes: of the model.
    """

    def __init__(self, weights: Mapping[str, Tensor], sizes: plain_dattn.Sizes) -> None:
        self.weights = {name: w.clone().requires_grad_() for name, w in weights.items()}
        self.sizes = sizes

    def trained(self) -> Iterable[Tensor]:
        """All of it."""
        return self.weights.values()

    def loss(self, sample: Caption, of: int) -> Tensor:
        """See `PlainModel`."""
        images = [] if sample.pixels is None else [(0, sample.pixels)]
        logits = plain_dattn.logits(self.weights, self.sizes, sample.ids, images)
        return F.cross_entropy(logits[:-1], sample.ids[1:], reduction="sum") / of


class StockLlava:
    """transformers' `LlavaForConditionalGeneration`; forward pass and loss are its own.

    The placeholder tokens of an image stand before the text. The tower's positions are frozen,
    since they are zeros in the trainer's model without visual positions.

    Args:
        weights: copied; the tower's last layer and norm, whose output LLaVA does not use, are not
            among them.
        config: of the model.
    """

    def __init__(self, weights: Mapping[str, Tensor], config: LlavaConfig) -> None:
        model: Any = LlavaForConditionalGeneration(config)
        left = model.load_state_dict(dict(weights), strict=False)
        unused = (f".layers.{config.vision_config.num_hidden_layers - 1}.", ".post_layernorm.")
        assert not left.unexpected_keys, left.unexpected_keys
        assert all(any(part in name for part in unused) for name in left.missing_keys), left
        model.model.vision_tower.embeddings.position_embedding.weight.requires_grad_(False)
        self.model, self.image_token = model.train(), int(config.image_token_id)
        vision = config.vision_config
        self.rows = (vision.image_size // vision.patch_size) ** 2

    def trained(self) -> Iterable[Tensor]:
        """What requires a gradient."""
        return (p for p in self.model.parameters() if p.requires_grad)

    def loss(self, sample: Caption, of: int) -> Tensor:
        """See `PlainModel`."""
        rows = 0 if sample.pixels is None else self.rows
        placeholders = torch.full((rows,), self.image_token)
        labels = torch.cat([torch.full((rows + 1,), IGNORED), sample.ids[1:]])
        return self.model(
            input_ids=torch.cat([placeholders, sample.ids])[None],
            pixel_values=None if sample.pixels is None else sample.pixels[None],
            labels=labels[None],
            num_items_in_batch=of,
        ).loss


def llava_config(
    text: Mapping[str, Any], vision: Mapping[str, Any], image_token: int
) -> LlavaConfig:
    """LLaVA-1.5 in small: CLIP's last layer but one without its class row, two linears, Mistral.

    Args:
        text: fields of `MistralConfig`.
        vision: fields of `CLIPVisionConfig`.
        image_token: id of the placeholder of one visual row; no text has it.
    """
    return LlavaConfig(
        text_config=MistralConfig(**text),
        vision_config=CLIPVisionConfig(**vision),
        image_token_index=image_token,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        attn_implementation="eager",
    )


def train(
    model: PlainModel, batches: Sequence[Sequence[Caption]], recipe: Recipe
) -> list[tuple[float, float]]:
    """Trains on one global batch a step.

    Weight decay is on matrices alone, not on norms, biases and the class row.

    Returns:
        Loss (mean over the supervised tokens of the global batch) and L2 norm of the gradients
        before clipping, of every step.
    """
    parameters = list(model.trained())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: rate(done + 1, recipe))
    curve = []
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        supervised, total = sum(sample.supervised for sample in batch), 0.0
        for sample in batch:
            loss = model.loss(sample, of=supervised)
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.clip_grad)
        optimizer.step()
        schedule.step()
        curve.append((total, float(norm)))
    return curve


def rate(step: int, recipe: Recipe) -> float:
    """Learning rate of step 1, 2, ... relative to its peak: linear warm-up, then cosine.

    After the warm-up's w steps the cosine starts from the peak; it would reach the minimum in the
    step after the last.
    """
    warmup = max(round(recipe.warmup_ratio * recipe.steps), 1)
    if step <= warmup:
        return step / warmup
    done = min((step - warmup) / (recipe.steps + 1 - warmup), 1.0)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return recipe.min_lr_ratio + (1 - recipe.min_lr_ratio) * cosine
