"""AnyRes: images of many shapes, several in a sample, and text-only samples; logits in layouts."""

from dataclasses import replace

import pytest
import torch

from dattn_mcore.config.load import merge, to_dict
from dattn_mcore.hf import DattnForConditionalGeneration
from tests.distributed.jobs import read_metrics, train_without_last_save
from tests.distributed.model_jobs import model_outputs
from tests.distributed.small_models import small_config
from tests.unit.convert.convert_helpers import make_checkpoint, make_tokenizer
from tests.unit.convert.raw_models import raw_config
from tools.checkpoint_convert.mcore_to_hf import convert as export


def test_views_change_what_is_learned(pool, shapes, tmp_path):
    """Runs that are compared in `test_features_by_layout` would not see views that are ignored."""
    losses = []
    for policy in ("stretch", "anyres_stretch", "anyres_letterbox"):
        data = {"image_policy": policy, "visual_budget": 192}
        tree = small_config(shapes, tmp_path / policy, data=data, train={"steps": 1})
        assert all(pool.run(train_without_last_save, 1, tree))
        losses.append(read_metrics(tmp_path / policy)[0]["loss"])
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


MODELS = [("mistral", "clip", -2), ("gemma2", "siglip", -1), ("llama", "aimv2", -2)]


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: "-".join(model[:2]))
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


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, {}),
        (2, {"tp": 2, "sp": True}),
        (2, {"pp": 2}),
        (4, {"tp": 2, "pp": 2, "sp": True}),
    ],
    ids=["alone", "tp2-sp", "pp2", "tp2-pp2-sp"],
)
def test_logits_equal_the_exports(pool, exported, world_size, parallel):
    checkpoint, tree, model = exported
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
