"""What the Hugging Face architecture of a model's family can hold; one line per breach.

A model is trained to be used: one that no export can express is refused before it is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dattn_mcore.config.schema import Config, ModelConfig

# What an architecture of transformers always does, and so cannot be switched off in an export.
FIXED: dict[str, dict[str, Any]] = {
    "mistral": {
        "activation": "silu",
        "zero_centered_gamma": False,
        "post_norms": False,
        "attention_softcap": None,
        "final_softcap": None,
        "scale_embeddings": False,
    },
    "gemma2": {
        "activation": "gelu_tanh",
        "zero_centered_gamma": True,
        "post_norms": True,
        "scale_embeddings": True,
    },
}
SELECT_LAYERS = (-1, -2)  # of a tower: all layers, or all but the last


def export(config: Config) -> Iterator[str]:
    """The run's model as its family has it."""
    yield from not_exportable(config.model)


def not_exportable(model: ModelConfig) -> Iterator[str]:
    """Why no Hugging Face model of the family is this one; nothing where one is."""
    llm, family = model.llm, model.family
    if family not in FIXED:
        return  # refused as a choice
    for name, value in FIXED[family].items():
        if getattr(llm, name) != value:
            yield _line(model, f"llm.{name}", f"{name}={_yaml(value)}")
    if family == "mistral":
        if llm.query_scale not in (None, llm.head_dim):
            yield _line(model, "llm.query_scale", f"query_scale=null or head_dim ({llm.head_dim})")
        if llm.sliding_window is not None and llm.sliding_window_every != 1:
            yield _line(model, "llm.sliding_window_every", "sliding_window_every=1")
    if family == "gemma2":
        if llm.query_scale is not None and not float(llm.query_scale).is_integer():
            yield _line(model, "llm.query_scale", "a whole number as query_scale")
        if llm.num_attention_heads > 0 and llm.hidden_size % llm.num_attention_heads:
            heads = f"a multiple of num_attention_heads={llm.num_attention_heads} as hidden_size"
            yield _line(model, "llm.hidden_size", heads)
    if model.vision.select_layer not in SELECT_LAYERS:
        yield (
            f"model.vision.select_layer={model.vision.select_layer} cannot be exported: it must "
            "be -1 (all layers) or -2 (without the last)"
        )


def _line(model: ModelConfig, name: str, rule: str) -> str:
    section, key = name.split(".")
    value = getattr(getattr(model, section), key)
    return (
        f"model.{name}={_yaml(value)} cannot be exported: model.family={model.family} has {rule}; "
        "use that, or another model.family"
    )


def _yaml(value: Any) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
