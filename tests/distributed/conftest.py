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
