"""Data that several tests of whole runs share."""

import json

import numpy as np
import pytest
from PIL import Image

SHAPES = [(60, 140), (200, 60), (90, 90), (50, 50), (300, 70), (64, 250)]


@pytest.fixture(scope="session")
def shapes(digits, tmp_path_factory):
    """Digits' tokenizer with images of other shapes."""
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "images").mkdir()
    (folder / "tokenizer.model").write_bytes((digits / "tokenizer.model").read_bytes())
    rng = np.random.default_rng(0)
    records = []
    for number in range(12):
        width, height = SHAPES[number % len(SHAPES)]
        noise = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((width, height))
        image.save(folder / "images" / f"{number}.png")
        images = [f"{i}.png" for i in range(number, max(number - number % 3, -1), -1)]
        question = "Which digit is in the top-left cell?"
        turns = [
            {"from": "human", "value": "<image>\n" * len(images) + question},
            {"from": "gpt", "value": f"The digit is {number % 10}."},
        ]
        record = {"id": str(number), "conversations": turns}
        records.append(record | ({"image": images} if images else {}))
    assert {len(record.get("image", ())) for record in records} == {0, 1, 2}
    (folder / "instruct.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="session")
def questions(digits, tmp_path_factory):
    """Samples about few images: questions, two images at once, text before an image, no image."""
    folder = tmp_path_factory.mktemp("questions")
    (folder / "images").mkdir()
    (folder / "tokenizer.model").write_bytes((digits / "tokenizer.model").read_bytes())
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate([(60, 140), (56, 56), (200, 60)]):
        noise = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((width, height))
        image.save(folder / "images" / f"{number}.png")
    question, records = "Which digit is in the top-left cell?", []
    for number in range(24):
        image = number % 3
        images = [] if number % 8 == 7 else [image, 1] if number % 4 == 1 else [image]
        turns = [
            {"from": "human", "value": "<image>\n" * bool(images) + question},
            {"from": "gpt", "value": f"The digit is {number % 10}."},
            {"from": "human", "value": "<image>\n" * (len(images) == 2) + question},
            {"from": "gpt", "value": f"{number % 7}"},
        ]
        if number % 6 == 4:  # text stands before the image
            turns[0]["value"], turns[2]["value"] = question, "<image>\n" + question
        names = [f"{one}.png" for one in images]
        record = {"id": str(number), "conversations": turns}
        records.append(record | ({"image": names} if names else {}))
    (folder / "instruct.json").write_text(json.dumps(records))
    return folder
