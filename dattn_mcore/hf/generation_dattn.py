"""What `generate` needs beside transformers' own: public methods only, none of its inner ones."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin

from .arguments_dattn import NO_EMBEDDINGS
from .cache_dattn import DattnCache, check_replaceable, is_cache
from .samples_dattn import by_sample, check_pixels

# "dynamic_full": transformers' own name for a dynamic cache that keeps what is behind a window.
CACHES = (None, "dynamic", "dynamic_full")
IMAGE_INPUTS = ("pixel_values", "image_grids", "image_columns", "image_cache")


class DattnGenerationMixin(GenerationMixin):
    """`generate` for prompts with images; the model's `forward` brings the cache."""

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """See transformers. Images are repeated with their samples, for beams too.

        `image_cache` is a `DattnImageCache`, which spares what it knows of the prompt's images.

        Raises:
            ValueError: a setting that this model cannot honour.
        """
        _check_settings(self, args, kwargs)
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
            return super().generate(inputs, *args, **kwargs)
        given = kwargs.get("image_columns")
        columns = placeholder_columns(self.config, input_ids, kwargs.get("attention_mask"))
        if given is not None:  # an assistant's prompt has grown since
            columns = F.pad(given, (0, input_ids.shape[1] - given.shape[1]))
        if (pixel_values := kwargs.get("pixel_values")) is not None and pixel_values.ndim == 4:
            kwargs["pixel_values"], kwargs["image_grids"] = _by_sample(columns, kwargs)
        beyond = self.config.image_token_id >= self.config.text_config.vocab_size
        if given is not None or not beyond or not bool(columns.any()):
            return super().generate(inputs, *args, **kwargs)
        # transformers looks up the score of every token of the prompt (a repetition penalty, a
        # guess of what follows), and this one has none: another stands in for it meanwhile.
        kwargs.pop("input_ids", None)
        kwargs["image_columns"] = columns
        prompt = input_ids.masked_fill(columns, _stand_in(self.config))
        output = super().generate(prompt, *args, **kwargs)
        sequences = output if isinstance(output, Tensor) else output.sequences
        columns = columns.to(sequences.device)
        columns = columns.repeat_interleave(len(sequences) // len(columns), dim=0)
        sequences[:, : columns.shape[1]].masked_fill_(columns, self.config.image_token_id)
        return output

    # Its signature is transformers' own, by which `generate` knows the names that it may pass.
    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See transformers; images are passed until the cache holds them."""
        caches = [value for value in (*args, *kwargs.values()) if is_cache(value)]
        for cache in caches:
            if not isinstance(cache, DattnCache):
                check_replaceable(cache)
        images = {name: kwargs.pop(name, None) for name in IMAGE_INPUTS}
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        begun = any(cache.get_seq_length() for cache in caches)
        if not begun or kwargs.get("is_first_iteration"):
            if (columns := images["image_columns"]) is not None:
                # As many columns as the ids have now, of which the last may be passed only.
                input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
                columns = F.pad(columns, (0, input_ids.shape[1] - columns.shape[1]))
                new = inputs["input_ids"].shape[1]
                images["image_columns"] = columns[:, columns.shape[1] - new :]
            inputs.update(images)
        return inputs

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching has a cache of its own, without visual keys.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "continuous batching (generate_batch, cache_implementation='paged') keeps no visual "
            "keys; use generate"
        )


def placeholder_columns(config: Any, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Which columns of `input_ids` are images, bool [batch, columns]."""
    columns = input_ids == config.image_token_id
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        new = attention_mask[:, max(0, attention_mask.shape[1] - input_ids.shape[1]) :]
        if new.shape == columns.shape:  # else forward says what is wrong with it
            columns = columns & new.to(columns.device).bool()
    return columns


def _by_sample(columns: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The images of the columns that no cache holds yet, sample by sample.

    `pixel_values` may hold the images of the whole prompt or, beside a cache, of its new columns.
    """
    pixel_values, grids = inputs["pixel_values"], inputs.get("image_grids")
    mask = inputs.get("attention_mask")
    given = len(pixel_values) if grids is None else len(grids)
    counts, before = columns.sum(1).cpu(), torch.zeros(len(columns), dtype=torch.long)
    past = max((cache.get_seq_length() for cache in inputs.values() if is_cache(cache)), default=0)
    if past and (mask is None or mask.shape == columns.shape):  # the ids are those of all columns
        before = columns[:, :past].sum(1).cpu()
        if given != int(counts.sum()):
            counts, before = counts - before, torch.zeros_like(before)
    if given != int(counts.sum()):
        raise ValueError(
            f"input_ids hold {int(counts.sum())} image placeholders, but pixel_values hold {given} "
            "images; pass one image per placeholder"
        )
    return by_sample(pixel_values, grids, counts, before)


def _check_settings(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses settings of generation that need another cache, or a model that sees no images."""
    configs = [kwargs.get("generation_config"), *args[:1], model.generation_config]
    config = next(config for config in configs if config is not None)

    def setting(name: str) -> Any:
        return kwargs[name] if name in kwargs else getattr(config, name, None)

    if kwargs.get("inputs_embeds") is not None:
        raise ValueError(NO_EMBEDDINGS)
    check_pixels(kwargs.get("pixel_values"))
    kind = setting("cache_implementation")
    if kind not in CACHES:
        raise ValueError(
            f"cache_implementation is {kind!r}; this model keeps visual keys as well and has the "
            "dynamic cache only: leave it out"
        )
    with_images = kwargs.get("pixel_values") is not None
    if with_images and setting("prefill_chunk_size"):
        raise ValueError("prefill_chunk_size cuts prompts with images apart; leave it out")
    if with_images and setting("token_healing"):
        raise ValueError("token_healing moves the columns of a prompt with images; leave it out")
    assistants = [a for a in (kwargs.get("assistant_model"), *args[6:7]) if a is not None]
    for assistant in assistants:
        if with_images and not isinstance(assistant, DattnGenerationMixin):
            raise ValueError(
                f"assistant_model is a {type(assistant).__name__}, which sees no images; it must "
                "be a D-Attn model, or the prompt without images"
            )


def _stand_in(config: Any) -> int:
    """A token that stands for images in a prompt: one that is neither padding nor an end."""
    text = config.text_config
    ends = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    first = [] if text.bos_token_id is None else [text.bos_token_id]
    taken = {text.pad_token_id, *ends}
    return next(t for t in (*first, *range(text.vocab_size)) if t not in taken)


__all__ = ["DattnGenerationMixin", "placeholder_columns"]
