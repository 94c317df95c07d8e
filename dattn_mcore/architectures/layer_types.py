"""Windows of layers, as Hugging Face lists them (`layer_types`) and as sizes have them."""

from __future__ import annotations

from collections.abc import Sequence

from dattn_mcore.architectures.records import Unsupported
from dattn_mcore.architectures.sizes import LlmConfig

_NAMES = {"sliding": "sliding_attention", "full": "full_attention"}


def layer_types(llm: LlmConfig) -> list[str]:
    """`layer_types` of a Hugging Face configuration."""
    return [_NAMES["full" if window is None else "sliding"] for window in llm.windows]


def windows_from(types: Sequence[str], window: int | None) -> dict[str, object]:
    """`sliding_window` and `layer_pattern` of a Hugging Face configuration; the shortest pattern.

    Raises:
        Unsupported: a type of layer that has no counterpart.
    """
    ours = {theirs: name for name, theirs in _NAMES.items()}
    if unknown := sorted(set(types) - ours.keys()):
        raise Unsupported(f"layer_types has {', '.join(unknown)}; only {', '.join(ours)} are known")
    kinds = [ours[name] for name in types]
    if window is None or "sliding" not in kinds:
        return {"sliding_window": None, "layer_pattern": ()}
    period = next(
        n for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds))
    )
    return {
        "sliding_window": window,
        "layer_pattern": () if period == 1 else tuple(kinds[:period]),
    }
