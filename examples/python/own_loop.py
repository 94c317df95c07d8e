"""A D-Attn model in a training loop of your own: no configuration file, no data pipeline.

    python examples/python/own_loop.py

Builds a tiny model from its records, and teaches it one pack of two samples on the CPU in a few
seconds. A trainer on Megatron-Core passes its own process groups, wraps the model in its DDP, and
takes the same `forward` through its pipeline schedule.
"""

from __future__ import annotations

import sys

import torch

from dattn_mcore.parallel import entry

entry.prepare_imports("cpu")  # Megatron-Core's import dies of a broken package

from dattn_mcore.architectures.sizes import AttentionConfig, LlmConfig, ModelConfig, VisionConfig
from dattn_mcore.layers.layout import build_seq_params
from dattn_mcore.layers.runtime import Runtime
from dattn_mcore.models import ModelInputs, build_model
from dattn_mcore.parallel.groups import single_process
from dattn_mcore.types import IGNORED_LABEL

STEPS = 8
TEXT_ROWS = 12  # of each sample


def main() -> None:
    """Trains, and prints the loss of each step."""
    model_config = ModelConfig(
        llm=LlmConfig(num_layers=2, hidden_size=64, ffn_hidden_size=128, head_dim=16),
        vision=VisionConfig(num_layers=2, hidden_size=64, ffn_hidden_size=128),
    )
    attention = AttentionConfig()  # D-Attn; v2v="causal", t2v_position="rope" is the baseline
    runtime = Runtime(loss_chunk=256, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))
    device = torch.device("cpu")
    with single_process("cpu") as groups:
        (model,) = build_model(model_config, attention, runtime, groups, device=device, seed=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        inputs = pack(model_config, attention)
        for step in range(1, STEPS + 1):
            loss = model(inputs).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            sys.stdout.write(f"step {step}  loss {loss.item():.4f}\n")


def pack(model: ModelConfig, attention: AttentionConfig) -> ModelInputs:
    """Two samples, one image before the text of each; pixels and ids are drawn at random."""
    generator = torch.Generator().manual_seed(0)
    vision = model.vision
    sample = ((True, vision.rows_per_tile), (False, TEXT_ROWS))
    params = build_seq_params([sample, sample], t2v_position=attention.t2v_position)
    ids = torch.randint(0, model.llm.vocab_size, (params.num_text,), generator=generator)
    labels = ids.roll(-1)  # each row predicts the next one
    labels[TEXT_ROWS - 1 :: TEXT_ROWS] = IGNORED_LABEL  # the last row of a sample has none
    size = (2, 3, vision.image_size, vision.image_size)
    tiles = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    return ModelInputs(params=params, text_ids=ids, labels=labels, tiles=tiles)


if __name__ == "__main__":
    main()
