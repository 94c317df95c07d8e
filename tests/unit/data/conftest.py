"""Shared pieces of the data tests: a toy tokenizer, a toy data set, a configuration around it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dattn_mcore.config.schema import Config, DataConfig, ModelConfig, TrainConfig, VisionConfig
from dattn_mcore.data.tokenizer import SentencePieceTokenizer, load_tokenizer, train_tokenizer
from tests.unit.data.golden import write_golden

TOY_TEXTS = [f"Which digit is in the {place} cell?" for place in ("top-left", "bottom-right")]
TOY_TEXTS += ["user", "model"]


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SentencePiece file."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer([*TOY_TEXTS, " 7", "0 1 2 3 4 5 6 7 8 9"], path)
    return path


@pytest.fixture(scope="session")
def toy_tokenizer(toy_model: Path) -> SentencePieceTokenizer:
    """A tiny tokenizer with the chat symbols."""
    tokenizer = load_tokenizer(toy_model)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return tokenizer


def _record(name: str, images: list[str], *turns: str) -> dict[str, Any]:
    """A LLaVA record; turns alternate, human first."""
    speakers = ("human", "gpt")
    made: dict[str, Any] = {
        "id": name,
        "conversations": [{"from": speakers[i % 2], "value": v} for i, v in enumerate(turns)],
    }
    if images:
        made["image"] = images[0] if len(images) == 1 else images
    return made


@pytest.fixture
def record() -> Callable[..., dict[str, Any]]:
    """Builds a LLaVA record from its id, image paths and turns."""
    return _record


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 records of every kind (one image, two images, text only) and their images."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    records = []
    for number in range(40):
        name = f"{number:02d}.png"
        pixels = rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)
        pixels[0, 0] = number  # a test recognises an image by its first pixel
        Image.fromarray(pixels).save(folder / "images" / name)
        answer = "7 " * int(rng.integers(1, 20))
        if number % 10 == 3:
            records.append(_record(f"r{number}", [], "text only", answer))
        elif number % 10 == 7:
            other = f"{number - 1:02d}.png"
            records.append(_record(f"r{number}", [name, other], "<image> a <image> b", answer))
        else:
            records.append(_record(f"r{number}", [name], "<image>\nwhich?", answer))
    (folder / "toy.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def make_config(toy_data: Path) -> Callable[..., Config]:
    """Builds a configuration over the toy data; keyword arguments change `data`."""

    def make(global_batch_size: int = 12, seed: int = 5, **data: Any) -> Config:
        settings = DataConfig(
            annotations=str(toy_data / "toy.json"),
            image_folder=str(toy_data / "images"),
            template="mistral",
            text_budget=160,
            visual_budget=64,
            image_backend="pillow",
        )
        return Config(
            model=ModelConfig(vision=VisionConfig(image_size=56, patch_size=14)),
            data=dataclasses.replace(settings, **data),
            train=TrainConfig(global_batch_size=global_batch_size, seed=seed),
        )

    return make


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with images of every format and colour mode; d_: DALI's by rule, p_: Pillow's."""
    folder = tmp_path_factory.mktemp("golden")
    write_golden(folder)
    return folder.resolve()


@pytest.fixture
def columns_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes Pillow resize along x, then along y, as all releases before 13 do, and torch.

    Pillow 13 starts with y where that is less work; rounding between the passes then differs.
    """
    resize = Image.Image.resize

    def in_two(self: Image.Image, size: tuple[int, int], *args: object, **kwargs: object):
        return resize(resize(self, (size[0], self.height), *args, **kwargs), size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", in_two)
