"""What the trainer's model says to some conversations, in a file that needs no trainer to read.

Each conversation has two turns. Saved are token ids, pixels, Megatron-Core's logits of every text
row, its greedy answers and the logits behind each of their tokens. `checker.py` holds an export to
them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from dattn_mcore.checkpoint.load import load_weights
from dattn_mcore.config.schema import Config
from dattn_mcore.data.batch import MicroBatch
from dattn_mcore.data.resize import to_tiles
from dattn_mcore.data.templates import (
    TextRun,
    encode_conversation,
    merge_runs,
    stop_id,
)
from dattn_mcore.data.tiles import choose_tiling
from dattn_mcore.data.tokenizer import Tokenizer
from dattn_mcore.parallel.groups import single_process
from dattn_mcore.training.inputs import to_model_inputs
from dattn_mcore.training.model import build_from_config
from dattn_mcore.types import image_shapes

NEW_TOKENS = 8
# Ten times the bound of `checker.py`: rounding must not turn a decision.
SMALLEST_MARGIN = 2e-4
# The user's turns of each conversation.
TURNS = (
    ("<image>\nWhich digit is in the top-left cell?", "And the 5? <image>"),
    ("<image> and <image>?", "Where is the 9?"),
    ("Hello", "Which digit is here? <image>"),
    ("The top row reads 4 and 0, <image> reads 7. Where is the 5?", "Hello"),
)
SIZES = ((28, 28), (84, 30), (30, 70), (45, 45), (50, 26), (28, 60))  # width, height


@dataclass(frozen=True)
class Tiles:
    """An image as the trainer's model gets it.

    Attributes:
        pixels: uint8 [tiles, 3, side, side].
        grid: columns and rows of its canvas; 0 and 0 for one tile.
    """

    pixels: Tensor
    grid: tuple[int, int]


class Trainer:
    """A Megatron-Core model that is asked with token ids and tiles."""

    def __init__(self, model: Any, config: Config, groups: Any, image_id: int) -> None:
        self._model, self._config, self._groups = model, config, groups
        self._image_id = image_id

    def logits(
        self, prompts: Sequence[Sequence[int]], images: Sequence[Sequence[Tiles]]
    ) -> list[Tensor]:
        """Logits [text rows, vocabulary] of each prompt; one micro-batch holds them all."""
        model = self._config.model
        layouts = []
        for ids, sample in zip(prompts, images, strict=True):
            rows = iter([len(image.pixels) * model.vision.rows_per_tile for image in sample])
            runs = [(True, next(rows)) if i == self._image_id else (False, 1) for i in ids]
            layouts.append(merge_runs(runs))
        shown = [image for sample in images for image in sample]
        texts = [[i for i in ids if i != self._image_id] for ids in prompts]
        text_ids = torch.tensor([i for text in texts for i in text])
        batch = MicroBatch(
            layouts=tuple(layouts),
            text_ids=text_ids,
            labels=torch.full_like(text_ids, -100),
            num_tiles=sum(len(image.pixels) for image in shown),
            tiles=torch.cat([image.pixels for image in shown]),
            sample_ids=tuple(map(str, range(len(prompts)))),
            num_samples=len(prompts),
            items=image_shapes(image.grid for image in shown),
        )
        inputs = to_model_inputs(batch, self._config, self._groups, torch.device("cpu"))
        with torch.no_grad():
            logits = self._model(inputs, return_logits=True)
        logits = logits[: len(text_ids), : model.llm.vocab_size].float()
        return list(logits.split([len(text) for text in texts]))

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        images: Sequence[Sequence[Tiles]],
        never: Sequence[int],
    ) -> tuple[list[list[int]], list[Tensor]]:
        """Greedy answers of `NEW_TOKENS` tokens, and the logits [tokens, vocabulary] behind each.

        Args:
            prompts: token ids with one placeholder per image.
            images: those of each prompt.
            never: tokens that are not chosen.
        """
        longer = [list(prompt) for prompt in prompts]
        seen: list[list[Tensor]] = [[] for _ in prompts]
        for _ in range(NEW_TOKENS):
            for ids, steps, rows in zip(longer, seen, self.logits(longer, images), strict=True):
                steps.append(rows[-1])
                scores = rows[-1].clone()
                scores[[i for i in never if i < len(scores)]] = -torch.inf
                best, second = scores.topk(2).values
                assert best - second > SMALLEST_MARGIN, "give this architecture another seed"
                ids.append(int(scores.argmax()))
        return [ids[-NEW_TOKENS:] for ids in longer], [torch.stack(steps) for steps in seen]


def save_answers(
    folder: Path, checkpoint: Path, config: Config, tokenizer: Tokenizer, export: Path
) -> None:
    """Writes pictures, `cases.json` and `tensors.safetensors`.

    Args:
        folder: to make.
        checkpoint: weights of the model.
        config: the run's.
        tokenizer: the run's.
        export: says the image token's id and the tokens that end an answer.
    """
    folder.mkdir()
    image_id = json.loads((export / "config.json").read_text())["image_token_id"]
    never = json.loads((export / "generation_config.json").read_text())["eos_token_id"]
    never.append(image_id)
    pictures = iter(range(len(SIZES)))
    cases: dict[str, Any] = {"new_tokens": NEW_TOKENS, "turns": [[], []]}
    tensors: dict[str, Tensor] = {}
    history: list[list[int]] = [[] for _ in TURNS]
    images: list[list[Tiles]] = [[] for _ in TURNS]
    cpu = torch.device("cpu")
    with single_process() as groups:
        (model,) = build_from_config(config, groups, cpu, initialize=False)
        load_weights(checkpoint, config, [model], groups)
        trainer = Trainer(model.eval(), config, groups, image_id)
        for turn in (0, 1):
            new: list[Tiles] = []
            for sample, texts in enumerate(TURNS):
                files = []
                for _ in range(texts[turn].count("<image>")):
                    number = next(pictures)
                    picture(number).save(folder / f"{number}.png")
                    files.append(f"{number}.png")
                    new.append(tiles_of(picture(number), config))
                    images[sample].append(new[-1])
                prompt = prompt_ids(tokenizer, config.data.template, texts[turn], image_id, turn)
                history[sample] += prompt
                cases["turns"][turn].append(
                    {"text": texts[turn], "images": files, "prompt": prompt}
                )
            tensors[f"{turn}.pixels"] = _normalised(new, config)
            tensors[f"{turn}.grids"] = torch.tensor([image.grid for image in new])
            for sample, rows in enumerate(trainer.logits(history, images)):
                tensors[f"{turn}.{sample}.prompt"] = rows.clone()
            answers, logits = trainer.answer(history, images, never)
            for sample, (answer, steps) in enumerate(zip(answers, logits, strict=True)):
                cases["turns"][turn][sample]["answer"] = answer
                tensors[f"{turn}.{sample}.answer"] = steps
                history[sample] += answer
    (folder / "cases.json").write_text(json.dumps(cases))
    save_file(tensors, folder / "tensors.safetensors")


def prompt_ids(tokenizer: Tokenizer, template: str, text: str, image_id: int, turn: int) -> list:
    """Ids of a user's turn up to where the model answers; of a later turn, behind an answer."""
    runs = encode_conversation(tokenizer, template, [text])
    ids = [i for run in runs for i in (run.ids if isinstance(run, TextRun) else (image_id,))]
    if turn == 0:
        return ids
    assert ids[0] == tokenizer.bos_id
    ends = [stop_id(tokenizer, template), *(tokenizer.encode("\n") if template == "gemma" else [])]
    return [*ends, *ids[1:]]


def picture(number: int) -> Image.Image:
    """A smooth picture: the trainer's resize and Pillow's differ by a grey level or two on it."""
    width, height = SIZES[number]
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = [np.sin(3 * (x * (channel + 1) + y * number + channel)) for channel in range(3)]
    return Image.fromarray((127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8))


def tiles_of(image: Image.Image, config: Config) -> Tiles:
    """The trainer's tiles of a picture."""
    data, side = config.data, config.model.vision.image_size
    tiling = choose_tiling(
        image.width,
        image.height,
        policy=data.image_policy,
        tile_size=side,
        grids=data.anyres_grids,
    )
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    fill = [int(255 * mean) for mean in data.image_mean]  # as the trainer's image loader
    return Tiles(to_tiles(pixels, side, data.image_policy, fill, data.anyres_grids), tiling.grid)


def _normalised(images: list[Tiles], config: Config) -> Tensor:
    """Pixels as the tower sees them."""
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (config.data.image_mean, config.data.image_std)
    )
    return (torch.cat([image.pixels for image in images]).float() / 255 - mean) / std
