"""Only the columns whose logits are read go through the last layer; all of them stay its keys."""

from __future__ import annotations

import pytest
import torch

from dattn_mcore.hf import DattnImageCache
from tests.unit.hf.hf_models import IMAGE, make_model, pixels

ROWS = [[1, 5, IMAGE, 6, 7, 8], [0, 0, 1, IMAGE, 9, 10], [0, 1, 11, 12, IMAGE, 13]]
MODES = [
    ("mistral", {}),
    ("gemma2", {"merge": "sum"}),
    ("gemma2", {"v2v": "causal", "t2v_position": "rope"}),
]


def inputs() -> dict[str, torch.Tensor]:
    """Three left-padded samples with an image each."""
    ids = torch.tensor(ROWS)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels(3)}


@pytest.mark.parametrize("keep", [1, 3, 6, 9])
@pytest.mark.parametrize(("family", "changes"), MODES)
def test_the_last_logits_are_those_of_all(family, changes, keep):
    model = make_model(family, **changes)
    rows = []
    last = model.model.language_model.layers[-1].mlp
    last.register_forward_hook(lambda _, given, __: rows.append(given[0].shape[1]))
    with torch.no_grad():
        whole = model(**inputs())
        kept = model(**inputs(), logits_to_keep=keep)
        torch.testing.assert_close(kept.logits, whole.logits[:, -keep:], atol=1e-5, rtol=1e-5)
        assert rows == [6, min(keep, 6)]
        further = {"input_ids": torch.tensor([[20], [21], [22]])}
        mask = torch.cat([inputs()["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
        answers = [
            model(**further, attention_mask=mask, past_key_values=out.past_key_values).logits
            for out in (whole, kept)
        ]
    torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-5)  # its keys are whole


def test_images_of_which_there_is_one_copy_are_read_by_the_last_columns():
    model = make_model()
    shown = {**inputs(), "pixel_values": pixels(1).expand(3, -1, -1, -1)}
    with torch.no_grad():
        whole = model(**shown).logits
        found = model(**shown, image_cache=DattnImageCache(), logits_to_keep=2).logits
    torch.testing.assert_close(found, whole[:, -2:], atol=1e-5, rtol=1e-5)
