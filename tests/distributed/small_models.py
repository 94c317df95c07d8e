"""A tiny model of each family and tower, as settings, and a configuration that trains one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dattn_mcore.config.load import merge

SMALL_MODEL: dict[str, Any] = {
    "llm": {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 16,
        "init_std": 0.05,
    },
    "vision": {
        "patch_size": 14,
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 2,
        "init_std": 0.05,
    },
    "projector": {"ffn_hidden_size": 48},
}
GEMMA: dict[str, Any] = {
    "family": "gemma2",
    "llm": {
        "attention_softcap": 5.0,
        "final_softcap": 3.0,
        "query_scale": 24.0,
        "sliding_window": 6,
        "layer_pattern": ["sliding", "full"],
        "tie_embeddings": True,
    },
}
GEMMA3: dict[str, Any] = {
    "family": "gemma3",
    "llm": {
        "query_scale": 24.0,
        "sliding_window": 6,
        "layer_pattern": ["sliding", "sliding", "full"],
        "rotary_base": 1000.0,
        "sliding_rotary_base": 100.0,
        "rope": {"kind": "linear", "factor": 8.0},
        "tie_embeddings": True,
    },
}
LLAMA: dict[str, Any] = {
    "family": "llama",
    "llm": {"rope": {"kind": "llama3", "factor": 8.0, "original_length": 32}},
}
MINISTRAL3: dict[str, Any] = {
    "family": "ministral3",
    "llm": {
        "rope": {  # of eight frequencies some as they were, some divided, some between
            "kind": "yarn",
            "factor": 8.0,
            "original_length": 8,
            "beta_slow": 0.02,
            "beta_fast": 1.0,
            "truncate": False,
            "attention_factor": 1.3,
            "query_scale_beta": 0.4,
        }
    },
}
OLMO2: dict[str, Any] = {"family": "olmo2"}
QWEN2: dict[str, Any] = {"family": "qwen2"}
QWEN3: dict[str, Any] = {"family": "qwen3"}
CLIP: dict[str, Any] = {
    "vision": {"kind": "clip", "activation": "quick_gelu", "select_layer": -2},
}
AIMV2: dict[str, Any] = {"vision": {"kind": "aimv2", "activation": "silu", "norm_eps": 1e-5}}
SMOLLM3: dict[str, Any] = {
    "family": "smollm3",
    "llm": {"rotary_pattern": [True, True, True, False], "tie_embeddings": True},
}


def small_config(data_dir: Path, run_dir: Path, **sections: Any) -> dict[str, Any]:
    """A configuration tree for a tiny model on the digits data."""
    tree: dict[str, Any] = {
        "model": SMALL_MODEL,
        "data": {
            "annotations": str(data_dir / "instruct.json"),
            "image_folder": str(data_dir / "images"),
            "tokenizer": str(data_dir / "tokenizer.model"),
            "template": "mistral",
            "prepare": "none",
            "text_budget": 128,
            "visual_budget": 96,
            "image_backend": "pillow",
            "prefetch": 1,
        },
        "optim": {"lr": 3e-3, "warmup_ratio": 0.0},
        "train": {"global_batch_size": 12, "steps": 3},
        "log": {"run_dir": str(run_dir), "interval": 1, "tensorboard": False},
        "checkpoint": {"save_interval": 1000},
    }
    return merge(tree, sections)
