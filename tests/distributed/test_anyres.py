"""AnyRes in every layout: images of many shapes, several in a sample, and text-only samples."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dattn_mcore.config.load import merge, to_dict
from dattn_mcore.hf import DattnForConditionalGeneration
from tests.distributed.jobs import model_outputs, read_metrics, run_training, small_config
from tests.distributed.test_parity import LAYOUTS, assert_same
from tests.unit.convert.convert_helpers import make_checkpoint, make_tokenizer
from tests.unit.convert.raw_models import raw_config
from tools.checkpoint_convert.mcore_to_hf import convert as export

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


IMAGE = 329  # no text id of `model_outputs`
# Runs of text rows, and canvases between them; rows of a tile are 2 x 2.
PACK = ([4, (2, 1), 6, (0, 0), 5], [(1, 3), (2, 2), 7], [9])
GRIDS = tuple(item for sample in PACK for item in sample if isinstance(item, tuple))


def layout_of(sample):
    runs = [
        (True, 4 * (1 + item[0] * item[1])) if isinstance(item, tuple) else (False, item)
        for item in sample
    ]
    merged = []
    for is_visual, rows in runs:
        if merged and merged[-1][0] == is_visual:
            rows += merged.pop()[1]
        merged.append((is_visual, rows))
    return tuple(merged)


@pytest.fixture(scope="module", params=[("mistral", "clip", -2), ("gemma2", "siglip", -1)])
def exported(request, tmp_path_factory):
    """A random checkpoint, its configuration, and its export."""
    folder = tmp_path_factory.mktemp("anyres")
    config = raw_config(*request.param, num_layers=4)
    data = replace(
        config.data,
        tokenizer=str(make_tokenizer(folder)),
        template="plain",
        image_policy="anyres_stretch",
    )
    config = replace(config, data=data)
    make_checkpoint(folder / "mcore", config)
    export(folder / "mcore", folder / "hf")
    model = DattnForConditionalGeneration.from_pretrained(folder / "hf").eval()
    model.config.image_token_id = IMAGE
    return folder / "mcore", to_dict(config), model


@pytest.mark.parametrize("name", ["alone", "tp2-sp", "pp2", "tp2-pp2-sp"])
def test_logits_equal_the_exports(pool, exported, name):
    checkpoint, tree, model = exported
    world_size, parallel = (1, {}) if name == "alone" else LAYOUTS[name]
    layouts = tuple(layout_of(sample) for sample in PACK)
    tree = merge(tree, {"parallel": parallel})
    arguments = (tree, layouts, None, str(checkpoint), None, GRIDS)
    *_, result = pool.run(model_outputs, world_size, *arguments)
    pixels = (result["tiles"].float() / 255 - 0.5) / 0.5
    text = iter(result["text_ids"].tolist())
    samples = []
    for sample in PACK:
        ids = []
        for item in sample:
            ids += [IMAGE] if isinstance(item, tuple) else [next(text) for _ in range(item)]
        samples.append(ids)
    longest = max(map(len, samples))
    input_ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in samples])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in samples])
    with torch.no_grad():
        expected = model(input_ids, pixels, mask, image_grids=torch.tensor(GRIDS)).logits
    expected = expected[(input_ids != IMAGE) & mask.bool()]
    found = result["logits"][: len(expected), : expected.shape[-1]]
    # Both float32, summed in another order; logits are of order one.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1
