"""A sample's branches train as samples of their own would, and do not see each other.

The branches of a record, as records of their own, must have the same losses and gradients in
float64: sharing the images, and each with a copy of them, attended by the reference backend.
"""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

from dattn_mcore.config.load import merge
from tests.distributed.branches_jobs import losses_of_data
from tests.distributed.small_models import GEMMA, small_config

QUESTION = "Which digit is in the top-left cell?"
REFERENCE = {"backend": "reference", "fold_visual_projection": False}


def said(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


RECORDS = [
    {
        "id": "a",
        "image": "0.png",
        "branches": [
            said(f"<image>\n{QUESTION}", "The digit is 1."),
            said(QUESTION, "2", f"<image>\n{QUESTION}", "The digit is 3."),  # text before the image
            said("<image>\n1?", "The digit is 4."),
        ],
    },
    {
        "id": "b",
        "images": ["1.png", "2.png"],
        "branches": [
            said(f"<image><image>{QUESTION}", "5"),
            said(f"<image>{QUESTION}<image>", "The digit is 6."),
        ],
    },
    {"id": "c", "branches": [said(QUESTION, "7"), said("8?", "The digit is 9.")]},
    {"id": "d", "image": "0.png", "conversations": said(f"<image>{QUESTION}", "0")},
]


def records_of_their_own():
    """Each branch as a record; ids as the job names branches."""
    own = []
    for record in RECORDS:
        rest = {k: v for k, v in record.items() if k not in ("branches", "conversations")}
        texts = record.get("branches") or [record["conversations"]]
        own += [
            rest | {"id": f"{record['id']}.{number}", "conversations": turns}
            for number, turns in enumerate(texts)
        ]
    return own


@pytest.fixture(scope="module")
def losses_of(pool, digits, tmp_path_factory):
    def run(records, model=None, attention=None, **data):
        folder = tmp_path_factory.mktemp("branches")
        (folder / "images").mkdir()
        (folder / "tokenizer.model").write_bytes((digits / "tokenizer.model").read_bytes())
        rng = np.random.default_rng(0)
        for number in range(3):
            pixels = rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        (folder / "instruct.json").write_text(json.dumps(records))
        data = {"text_budget": 512, "visual_budget": 512, **data}
        tree = small_config(folder, folder / "run", data=data, attention=attention or {})
        tree["model"] = merge(tree["model"], model or {})
        tree["train"]["global_batch_size"] = len(records)
        ((losses, gradients, rows),) = pool.run(losses_of_data, 1, tree)
        return losses, gradients, rows

    return run


def compare(found, expected):
    (losses, gradients, _), (of_own, own_gradients, _) = found, expected
    # Ids of records of their own carry the place of a text already.
    of_own = {name.rpartition(".")[0]: part for name, part in of_own.items()}
    assert losses.keys() == of_own.keys() and len(losses) == 8
    for name, part in losses.items():
        torch.testing.assert_close(part, of_own[name], atol=1e-6, rtol=0, msg=name)
        assert len(part) > 0
    assert gradients.keys() == own_gradients.keys()
    for key, gradient in gradients.items():
        scale = own_gradients[key].abs().max()
        assert scale > 0, key
        # float32 in places: norms, the loss, positions of rows.
        bound = float(1e-6 * scale)
        torch.testing.assert_close(gradient, own_gradients[key], atol=bound, rtol=0, msg=key)


@pytest.mark.parametrize(
    ("model", "attention"),
    [({}, {}), ({}, {"merge": "sum"}), (GEMMA, {"backend": "reference"})],
    ids=["sdpa", "sum", "gemma2"],
)
def test_branches_train_as_samples_of_their_own(losses_of, model, attention):
    found = losses_of(RECORDS, model, attention)
    own = records_of_their_own()
    shared = losses_of(own, model, attention)
    apart = losses_of(own, model, {**attention, **REFERENCE}, share_images=False)
    compare(found, shared)
    compare(found, apart)
    tile = apart[2] // 8  # 3 + 2 x 2 + 1 images
    assert found[2] == shared[2] == 3 * tile


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_a_branch_does_not_depend_on_another(losses_of, backend):
    """Numbers of rows stay, so that nothing but the text differs: equal to the last bit."""
    attention = {"backend": backend}
    changed = copy.deepcopy(RECORDS)
    changed[0]["branches"][1] = said(QUESTION, "8", f"<image>\n{QUESTION}", "The digit is 0.")
    changed[2]["branches"][0] = said(QUESTION, "1")
    before, _, _ = losses_of(RECORDS, attention=attention)
    after, _, _ = losses_of(changed, attention=attention)
    same = {name for name, part in before.items() if torch.equal(part, after[name])}
    assert same == before.keys() - {"a.1", "c.0"}
