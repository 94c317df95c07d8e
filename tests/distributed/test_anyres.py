"""AnyRes in every layout: images of many shapes, several in a sample, and text-only samples."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.distributed.jobs import read_metrics, run_training, small_config
from tests.distributed.test_parity import LAYOUTS, assert_same

SHAPES = [(60, 140), (200, 60), (90, 90), (50, 50), (300, 70), (64, 250)]


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def metrics_of(pool, shapes, tmp_path_factory):
    """Trains three steps in a layout; one process once for all tests."""
    done = {}

    def run(policy, name="alone"):
        if (policy, name) not in done:
            world_size, parallel = (1, {}) if name == "alone" else LAYOUTS[name]
            run_dir = tmp_path_factory.mktemp("run")
            data = {"image_policy": policy, "visual_budget": 192}
            tree = small_config(shapes, run_dir, parallel=parallel, data=data)
            assert all(pool.run(run_training, world_size, tree))
            done[policy, name] = read_metrics(run_dir)
        return done[policy, name]

    return run


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("tp2-sp", "anyres_stretch"),
        ("pp2", "anyres_letterbox"),
        ("dp2", "anyres_stretch"),
        ("tp2-pp2-sp", "anyres_stretch"),
    ],
)
def test_layout(metrics_of, name, policy):
    assert_same(metrics_of(policy, name), metrics_of(policy))


def test_views_change_what_is_learned(metrics_of):
    """The comparison above would not see views that are ignored."""
    losses = [metrics_of(p)[0]["loss"] for p in ("stretch", "anyres_stretch", "anyres_letterbox")]
    assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[i + 1 :]) > 1e-4
