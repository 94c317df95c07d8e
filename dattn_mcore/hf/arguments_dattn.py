"""What `forward` makes of its arguments: it honours each, or refuses it in one line."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache_dattn import DattnCache, is_cache
from .configuration_dattn import releases
from .samples_dattn import IGNORED_LABEL

NO_EMBEDDINGS = "inputs_embeds is not supported; pass input_ids, which say where images stand"
_KNOWN_OUTPUTS = {"loss", "logits", "hidden_states", "attentions"}


def check_further(arguments: dict[str, Any], past: int, like: Tensor) -> None:
    """Looks at the arguments of `forward` that it has no name for.

    transformers hands its own arguments to every model, other ones in every release. Those that
    say what holds anyway are passed over, and so are caches, which `own_cache` looks at.

    Args:
        arguments: by name.
        past: columns that the cache holds.
        like: input ids of the new columns.

    Raises:
        ValueError: one of them asks for something that this model does not do.
    """
    harmless = {
        "cache_position": lambda value: _is_range(value, past, like),
        "token_type_ids": lambda value: isinstance(value, Tensor) and not value.any(),
    }
    refused = []
    for name, value in arguments.items():
        unset = value is None or (value is False and name.startswith("output_"))
        if unset or is_cache(value) or (name in harmless and harmless[name](value)):
            continue
        refused.append(name)
    if "inputs_embeds" in refused:
        raise ValueError(NO_EMBEDDINGS)
    if refused:
        raise ValueError(
            f"forward does not honour {', '.join(sorted(refused))}; leave it out ({releases()})"
        )


def _is_range(value: Any, past: int, like: Tensor) -> bool:
    """Whether positions in the cache are those that follow on what it holds."""
    if not isinstance(value, Tensor) or value.shape != like.shape[1:]:
        return False
    return bool((value == torch.arange(past, past + len(value), device=value.device)).all())


def check_positions(position_ids: Tensor | None, derived: Tensor, live: Tensor) -> None:
    """Refuses positions of text rows other than those that follow from the prompt.

    Args:
        position_ids: int64 [batch or 1, columns] as given; None: not given.
        derived: int64 [batch, columns].
        live: bool [batch, columns]: text rows. What stands at padding and images is not looked at.

    Raises:
        ValueError: a position differs.
    """
    if position_ids is None:
        return
    columns = derived.shape[1]
    if position_ids.shape not in (derived.shape, (1, columns)):
        raise ValueError(
            f"position_ids have shape {list(position_ids.shape)}; it must be "
            f"{list(derived.shape)}, one for each column of input_ids"
        )
    if bool(((position_ids != derived) & live).any()):
        raise ValueError(
            "position_ids are not those of one document a row, counted from its first text row "
            "(an image counts none, or its visual rows if t2v_position is rope); leave them out, "
            "and give documents that are packed into one row a row each"
        )


def check_shapes(
    input_ids: Any,
    attention_mask: Any,
    labels: Tensor | None,
    logits_to_keep: int | Tensor,
    cache: DattnCache | None,
) -> None:
    """Refuses inputs of `forward` that do not fit together.

    Raises:
        ValueError: a mask, labels or a cache of another shape, or labels of a part of the logits.
    """
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
        raise ValueError("input_ids must be a tensor [batch, columns]")
    batch, columns = input_ids.shape
    past = 0 if cache is None else cache.get_seq_length()
    if cache is not None and cache.text_live is not None and len(cache.text_live) != batch:
        raise ValueError(f"the cache holds {len(cache.text_live)} samples, but input_ids {batch}")
    if attention_mask is not None:
        whole = [batch, past + columns]
        shape = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else None
        if shape not in ([batch, columns], whole):
            raise ValueError(
                f"attention_mask is {shape or type(attention_mask).__name__}; it must be "
                f"[batch, columns], here {whole}, 1 for a token and 0 for padding"
            )
        if attention_mask.is_floating_point() and bool(
            ((attention_mask != 0) & (attention_mask != 1)).any()
        ):
            raise ValueError(
                "attention_mask holds other numbers than 0 and 1; a mask that is added to scores "
                "(0 and -inf) is not honoured, give 1 for a token and 0 for padding"
            )
        if past and shape == whole and cache is not None:
            _check_earlier(attention_mask[:, :past], cache)
    if isinstance(logits_to_keep, int) and logits_to_keep < 0:
        raise ValueError(f"logits_to_keep is {logits_to_keep}; it must be 0 (all) or more")
    if labels is None:
        return
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels have shape {list(labels.shape)}, but input_ids {[batch, columns]}"
        )
    if not isinstance(logits_to_keep, int) or logits_to_keep:
        raise ValueError("the loss needs all logits: pass labels or logits_to_keep, not both")


def _check_earlier(mask: Tensor, cache: DattnCache) -> None:
    """Refuses a mask of the cached columns that is not the one they were computed with."""
    assert cache.text_live is not None and cache.image_starts is not None
    if bool(
        ((cache.text_live | cache.image_starts) != mask.to(cache.text_live.device).bool()).any()
    ):
        raise ValueError(
            "attention_mask differs from the one that the cached columns were computed with; "
            "pass the same, or begin without a cache"
        )


def cache_field(output: Any = CausalLMOutputWithPast) -> str:
    """The name under which this release looks for the cache in a model's output.

    Raises:
        RuntimeError: it has none, or several that may be it.
    """
    names = [field.name for field in fields(output)]
    unknown = [name for name in names if name not in _KNOWN_OUTPUTS]
    if len(unknown) != 1:
        raise RuntimeError(
            f"{output.__name__} has the fields {', '.join(names)}, of which one must be the "
            f"cache; {releases()}"
        )
    return unknown[0]


def check_counted(labels: Tensor, live: Tensor) -> None:
    """Refuses labels that a trainer counts and that no row predicts.

    Args:
        labels: int64 [batch, columns].
        live: bool [batch, columns], columns of text.

    Raises:
        ValueError: a label stands at an image or at padding.
    """
    counted = labels != IGNORED_LABEL
    dropped = int((counted & ~live.to(labels.device)).sum())
    if dropped:
        raise ValueError(
            f"labels hold {dropped} tokens at images or padding, which no row predicts, and "
            "num_items_in_batch counts them, so the loss would be too small; set them to "
            f"{IGNORED_LABEL}: processor(..., return_labels=True) does"
        )


__all__ = [
    "NO_EMBEDDINGS",
    "cache_field",
    "check_counted",
    "check_positions",
    "check_shapes",
    "check_further",
]
