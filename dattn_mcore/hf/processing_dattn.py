"""Processor: images of the tower's size, one `<image>` token per image, the chat template."""

from __future__ import annotations

from typing import Any

import torch
from transformers import ProcessorMixin

from .samples_dattn import IGNORED_LABEL


class DattnProcessor(ProcessorMixin):
    """An image processor and a tokenizer in one.

    The `<image>` token is not expanded: the model makes visual rows beside the text. A prompt's
    special tokens stand in its text (the chat template writes them), so the tokenizer adds none.
    Batches are padded on the left, as generation needs.
    """

    # Not every release looks at a `text_kwargs` of the class: `__call__` gives these itself.
    text_defaults = {"add_special_tokens": False, "padding_side": "left"}

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        **kwargs: Any,
    ) -> None:
        if kwargs:
            raise TypeError(
                f"DattnProcessor does not know {', '.join(sorted(kwargs))}; leave it out"
            )
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """See transformers; text is not given special tokens, and padded on the left.

        Args:
            images: see transformers.
            text: see transformers.
            **kwargs: see transformers; and `return_labels`, for training: adds `labels`, which are
                `input_ids` with -100 where no row predicts a token (images, padding, and the first
                text token of each sample), so that a trainer that counts labels counts right.
                Mask the prompt where only answers are to be learnt.

        Raises:
            ValueError: labels are asked for, but no tensors.
        """
        return_labels = kwargs.pop("return_labels", False)
        nested = kwargs.get("text_kwargs") or {}
        for name, value in self.text_defaults.items():
            if name not in nested:
                kwargs.setdefault(name, value)
        found = super().__call__(images=images, text=text, **kwargs)
        if return_labels:
            found["labels"] = labels_of(found, self.image_token_id)
        return found

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """One placeholder stays one placeholder."""
        return self.image_token


def labels_of(found: Any, image_token_id: int) -> torch.Tensor:
    """The ids of a batch, with -100 where no row predicts a token."""
    ids, mask = found.get("input_ids"), found.get("attention_mask")
    if not isinstance(ids, torch.Tensor) or not isinstance(mask, torch.Tensor):
        raise ValueError(
            "return_labels needs text with its attention mask as tensors; give text and "
            "return_tensors='pt'"
        )
    live = mask.bool() & (ids != image_token_id)
    return ids.masked_fill(~live | (live.cumsum(1) == 1), IGNORED_LABEL)


__all__ = ["DattnProcessor"]
