"""The trained model against its export: the same keys, and the same logits."""

from dataclasses import replace

import pytest
import torch

from dattn_mcore.checkpoint.files import begin_save
from dattn_mcore.checkpoint.state import model_state
from dattn_mcore.config.schema import AttentionConfig
from dattn_mcore.data.batch import MicroBatch
from dattn_mcore.hf import DattnForConditionalGeneration
from dattn_mcore.parallel.groups import single_process
from dattn_mcore.training.inputs import to_model_inputs
from dattn_mcore.training.model import build_from_config
from tests.unit.convert.convert_helpers import make_tokenizer, small_config
from tools.checkpoint_convert import mcore_to_hf
from tools.checkpoint_convert.dist_checkpoint import write_manifest

IMAGE = "image"
# Reading order of two samples: text ids and images.
SAMPLES = [[1, 5, 6, IMAGE, 7, 8, 9, IMAGE, 10, 11, 12], [1, 30, 31, 32]]
CASES = [
    ("mistral", "siglip", {}, AttentionConfig()),
    ("gemma2", "clip", {}, AttentionConfig()),
    ("gemma2", "siglip", {"visual_positions": False}, AttentionConfig(merge="sum")),
    ("mistral", "clip", {}, AttentionConfig(v2v="causal", t2v_position="rope")),
    ("gemma2", "siglip", {}, AttentionConfig(v2v="causal", t2v_position="rope")),
    ("mistral", "siglip", {}, AttentionConfig(v2v="causal")),
    ("mistral", "siglip", {}, AttentionConfig(t2v_position="rope", merge="sum")),
    ("mistral", "aimv2", {}, AttentionConfig()),
    ("gemma2", "aimv2", {"visual_positions": False}, AttentionConfig()),
]


def randomize(model: torch.nn.Module) -> None:
    """Large random weights everywhere, so that every term matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(noise * 0.2)
            else:
                parameter.copy_(noise * 0.2)


def micro_batch(rows_per_image: int) -> tuple[MicroBatch, torch.Tensor]:
    """Both samples as one pack, and its tiles."""
    layouts = []
    for sample in SAMPLES:
        runs: list[tuple[bool, int]] = []
        for item in sample:
            if item == IMAGE:
                runs.append((True, rows_per_image))
            elif runs and not runs[-1][0]:
                runs[-1] = (False, runs[-1][1] + 1)
            else:
                runs.append((False, 1))
        layouts.append(tuple(runs))
    ids = torch.tensor([i for sample in SAMPLES for i in sample if i != IMAGE])
    tiles = torch.randint(
        0, 256, (2, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    batch = MicroBatch(
        layouts=tuple(layouts),
        text_ids=ids,
        labels=torch.full_like(ids, -100),
        num_tiles=2,
        tiles=tiles,
        sample_ids=("a", "b"),
        num_samples=2,
    )
    return batch, tiles


@pytest.mark.parametrize(("family", "kind", "model", "attention"), CASES)
def test_logits_of_the_export_equal_the_trained_models(tmp_path, family, kind, model, attention):
    """Keys as the model saves them, and the same logits from the exported folder."""
    tokenizer = make_tokenizer(tmp_path)
    config = replace(small_config(tokenizer, family, kind, **model), attention=attention)
    rows = (config.model.vision.image_size // config.model.vision.patch_size) ** 2
    batch, tiles = micro_batch(rows)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    with single_process() as groups:
        (trained,) = build_from_config(config, groups, torch.device("cpu"))
        randomize(trained)
        trained.eval()
        inputs = to_model_inputs(batch, config, groups, torch.device("cpu"))
        with torch.no_grad():
            expected = trained(inputs, return_logits=True)[: len(batch.text_ids)]
        state = model_state([trained], groups)
        begin_save(state, checkpoint, groups.dp_cp).execute_sync()
    write_manifest(checkpoint, config)

    mcore_to_hf.convert(checkpoint, tmp_path / "hf")
    exported = DattnForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    longest = max(map(len, SAMPLES))
    image = exported.config.image_token_id
    ids = [[0] * (longest - len(s)) + [image if i == IMAGE else i for i in s] for s in SAMPLES]
    mask = [[0] * (longest - len(s)) + [1] * len(s) for s in SAMPLES]
    input_ids, mask = torch.tensor(ids), torch.tensor(mask)
    pixels = (tiles.float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        logits = exported(input_ids, pixels, mask).logits
    live = (input_ids != image) & mask.bool()
    vocab = config.model.llm.vocab_size
    # Both are float32; they order sums differently, logits are of order one
    torch.testing.assert_close(logits[live], expected[:, :vocab], atol=1e-4, rtol=0)
    assert logits[live].std() > 0.1
