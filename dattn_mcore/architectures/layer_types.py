"""Windows of layers, as Hugging Face lists them (`layer_types`) and as sizes have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from dattn_mcore.architectures.records import HfConfig, Unsupported
from dattn_mcore.architectures.sizes import LlmConfig

Kind = TypeVar("Kind")
_NAMES = {"sliding": "sliding_attention", "full": "full_attention"}


def windows_to_hf(llm: LlmConfig) -> dict[str, Any]:
    """Fields of a Hugging Face configuration."""
    types = [_NAMES["full" if window is None else "sliding"] for window in llm.windows]
    return {"sliding_window": llm.sliding_window, "layer_types": types}


def switched_windows_to_hf(llm: LlmConfig) -> dict[str, Any]:
    """The same, for configurations in which a setting of its own turns windows on."""
    return {"use_sliding_window": llm.sliding_window is not None, **windows_to_hf(llm)}


def windows_from_hf(config: HfConfig) -> dict[str, Any]:
    """Values of `LlmConfig`.

    Raises:
        Unsupported: a type of layer that has no counterpart.
    """
    types, window = config.layer_types, config.sliding_window
    ours = {theirs: name for name, theirs in _NAMES.items()}
    if unknown := sorted(set(types) - ours.keys()):
        raise Unsupported(f"layer_types has {', '.join(unknown)}; only {', '.join(ours)} are known")
    kinds = [ours[name] for name in types]
    if window is None or "sliding" not in kinds:
        return {"sliding_window": None, "layer_pattern": ()}
    pattern = shortest_pattern(kinds)
    return {"sliding_window": window, "layer_pattern": () if len(pattern) == 1 else pattern}


def shortest_pattern(kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    """The least that, repeated over the layers, gives each of them its kind."""
    repeats = range(1, len(kinds) + 1)
    period = next(n for n in repeats if all(k == kinds[i % n] for i, k in enumerate(kinds)))
    return tuple(kinds[:period])
