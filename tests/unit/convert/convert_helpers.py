"""Small random checkpoints for the converter's tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dattn_mcore.architectures import language_model
from dattn_mcore.architectures.parameters import Entry
from dattn_mcore.architectures.sizes import RopeConfig
from dattn_mcore.architectures.tables import model_table
from dattn_mcore.config.schema import (
    AttentionConfig,
    Config,
    DataConfig,
    LlmConfig,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
)
from dattn_mcore.data.tokenizer import NEW_SYMBOLS, train_tokenizer
from tools.checkpoint_convert.dist_checkpoint import write_checkpoint
from tools.checkpoint_convert.streaming import Planned

TEXTS = (
    "Which digit is in the top-left cell?",
    "The top row reads 4 and 0, the bottom row reads 9 and 7.",
    "Where is the 5? In the bottom-right cell.",
)


# What sizes of a family say beside widths and depths, so small that three layers show it.
_GEMMA = {
    "query_scale": 16.0,
    "sliding_window": 6,
    "tie_embeddings": True,
}
TRAITS: dict[str, dict[str, Any]] = {
    "mistral": {},
    "gemma2": {
        **_GEMMA,
        "attention_softcap": 50.0,
        "final_softcap": 30.0,
        "layer_pattern": ("sliding", "full"),
    },
    "gemma3": {
        **_GEMMA,
        "layer_pattern": ("sliding", "sliding", "full"),
        "rotary_base": 1000.0,
        "sliding_rotary_base": 100.0,
        "rope": RopeConfig(kind="linear", factor=8.0),
    },
    "llama": {"rope": RopeConfig(kind="llama3", factor=8.0, original_length=64)},
    "ministral3": {
        "rope": RopeConfig(  # each of the four frequencies is stretched by another factor
            kind="yarn",
            factor=8.0,
            original_length=4,
            beta_slow=0.05,
            beta_fast=0.5,
            truncate=False,
            attention_factor=1.3,
            query_scale_beta=0.4,
        )
    },
    "olmo2": {},
    "qwen2": {"tie_embeddings": True},
    "qwen3": {},
    "smollm3": {"tie_embeddings": True, "rotary_pattern": (True, True, False)},
}
# What sizes of a tower say beside widths and depths.
TOWER_TRAITS: dict[str, dict[str, Any]] = {
    "siglip": {},
    "clip": {"activation": "quick_gelu", "select_layer": -2},
    "aimv2": {"activation": "silu", "norm_eps": 1e-5},
}


def small_config(
    tokenizer: Path,
    family: str = "mistral",
    kind: str = "siglip",
    template: str | None = None,
    vocab_size: int = 330,
    **model,
) -> Config:
    """Two layers, 4 heads in 2 groups, vocabulary padded from 330 to 384."""
    llm = LlmConfig(
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=8,
        vocab_size=vocab_size,
        **TRAITS[family],
    )
    vision = VisionConfig(
        kind=kind,
        image_size=28,
        patch_size=14,
        num_layers=3,
        hidden_size=24,
        ffn_hidden_size=40,
        num_attention_heads=2,
        **TOWER_TRAITS[kind],
    )
    return Config(
        model=ModelConfig(
            family=family,
            llm=llm,
            vision=vision,
            projector=ProjectorConfig(ffn_hidden_size=40),
            **model,
        ),
        attention=AttentionConfig(),
        data=DataConfig(
            tokenizer=str(tokenizer), template=template or language_model(family).chat.name
        ),
    )


def random_tensors(
    table: list[Entry], dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[tuple[str, int | None], torch.Tensor]:
    """Random Megatron-Core tensors of a table; padded vocabulary rows are junk, not zeros."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for entry in table:
        if entry.key is None:
            continue
        for layer in entry.steps():
            shape = entry.mcore_shape()[0 if layer is None else 1 :]
            tensor = torch.randn(shape, generator=generator) * 0.2
            wide = "_position.fc" in entry.key  # float32 in every model
            tensors[entry.key, layer] = tensor if wide else tensor.to(dtype)
    return tensors


def make_checkpoint(path: Path, config: Config, dtype: torch.dtype = torch.float32) -> dict:
    """Writes a random checkpoint and returns its tensors."""
    table = model_table(config.model)
    tensors = random_tensors(table, dtype)
    write_checkpoint(path, plan(table, tensors), config)
    return tensors


def plan(table: list[Entry], tensors: dict[tuple[str, int | None], torch.Tensor]) -> list[Planned]:
    """Tensors by (key, layer) in the form that the writer takes."""
    layers = {entry.key: entry.layers for entry in table}
    return [
        Planned(key, layer, layers.get(key), tuple(t.shape), t.dtype, lambda t=t: t)
        for (key, layer), t in tensors.items()
    ]


def make_tokenizer(folder: Path, symbols: Sequence[str] = NEW_SYMBOLS) -> Path:
    """A tiny SentencePiece model, as the digits task trains it."""
    path = folder / "tokenizer.model"
    train_tokenizer(TEXTS, path, symbols=symbols)
    return path
