"""What fine-tuning with transformers' own tools needs of the model."""

import pytest
import torch

from dattn_mcore.hf.attention_dattn import DattnDecoderLayer
from dattn_mcore.hf.layout_dattn import build_layout
from tests.unit.hf.hf_models import IMAGE, make_model, pixels

IDS = torch.tensor([[1, 5, IMAGE, 7, 8, 9], [1, 5, 6, 7, IMAGE, 9]])
LABELS = IDS.masked_fill(IDS == IMAGE, -100)


def gradients(model):
    model.zero_grad()
    model(IDS, pixels(2), labels=LABELS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_gradient_checkpointing_changes_no_gradient(family, monkeypatch):
    """The same operations run twice: the same bits. Each layer's forward is seen to run again."""
    model = make_model(family).train()
    expected = gradients(model)
    calls = []
    attend = type(model.model.language_model.layers[0].self_attn).forward
    monkeypatch.setattr(
        type(model.model.language_model.layers[0].self_attn),
        "forward",
        lambda self, *args, **kwargs: calls.append(self) or attend(self, *args, **kwargs),
    )
    gradients(model)
    assert len(calls) == 3
    model.gradient_checkpointing_enable()
    assert all(
        layer.gradient_checkpointing
        for layer in model.modules()
        if isinstance(layer, DattnDecoderLayer)
    )
    calls.clear()
    found = gradients(model)
    assert len(calls) == 6
    assert found.keys() == expected.keys() and len(found) > 40
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_steps_of_several_passes_share_one_mean():
    """transformers' Trainer says how many labels all passes of a step have together."""
    model = make_model()
    with torch.no_grad():
        alone = [
            model(IDS[i : i + 1], pixels(2)[i : i + 1], labels=LABELS[i : i + 1]).loss
            for i in (0, 1)
        ]
        shared = [
            model(
                IDS[i : i + 1],
                pixels(2)[i : i + 1],
                labels=LABELS[i : i + 1],
                num_items_in_batch=count,
            ).loss
            for i, count in ((0, 8), (1, torch.tensor(8)))
        ]
    for one, part in zip(alone, shared, strict=True):
        torch.testing.assert_close(part, one * 4 / 8)  # four labels of five texts are predicted


def test_labels_that_a_trainer_counts_and_nothing_predicts_are_refused():
    """transformers' Trainer counts all that are not -100, before the model sees them."""
    model = make_model()
    mask = torch.ones_like(IDS)
    mask[1, 0] = 0
    padded = LABELS.masked_fill(mask == 0, 1)
    for labels in (IDS, padded):
        inputs = {"pixel_values": pixels(2), "attention_mask": mask}
        assert model(IDS, **inputs, labels=labels).loss.isfinite()
        with pytest.raises(ValueError, match="at images or padding, .* return_labels=True"):
            model(IDS, **inputs, labels=labels, num_items_in_batch=8)


def test_ids_are_needed():
    """They say where images stand; embeddings in their place would lose that."""
    model = make_model()
    embedded = model.get_input_embeddings()(IDS[:, :2])
    with pytest.raises(ValueError, match="pass input_ids"):
        model(IDS, pixels(2), inputs_embeds=embedded)
    with pytest.raises(ValueError, match="inputs_embeds"):  # what transformers says of it
        model.generate(inputs_embeds=embedded, max_new_tokens=2)


def test_a_layout_follows_its_layer_to_another_device():
    """accelerate calls `to` on whatever a layer of another device is given."""
    live = torch.ones(1, 4, dtype=torch.bool)
    starts = torch.tensor([[False, True, False, False]])
    visual = torch.ones(1, 9, dtype=torch.bool)
    rows = (live & ~starts, starts, visual, torch.zeros(1, 9, dtype=torch.long))
    for causal in (False, True):
        layout = build_layout(rows, 4, 9, causal_v2v=causal, shared_axis=causal)
        moved = layout.to("meta", non_blocking=True)
        for name, value in vars(layout).items():
            other = getattr(moved, name)
            if isinstance(value, torch.Tensor):
                assert other.is_meta and other.shape == value.shape
            else:
                assert other == value
        assert moved.t2t.is_meta and not layout.t2t.is_meta
