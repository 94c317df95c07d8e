"""The D-Attn vision-language model for transformers: text, images, `generate`.

`input_ids` holds one `config.image_token_id` per image, `pixel_values` the tiles of the images in
the same order over the whole batch, `image_grids` how many tiles each image has beside its base
view. A text row sees the images of its own sample that stand before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

# Some releases of transformers copy only what this file itself names to where they run it from:
# all neighbours are named here.
from .arguments_dattn import cache_field, check_counted, check_further, check_shapes
from .attention_dattn import DattnDecoderLayer
from .cache_dattn import DattnCache, is_cache, own_cache
from .configuration_dattn import DattnConfig, releases
from .fingerprint_dattn import state_of
from .generation_dattn import DattnGenerationMixin, placeholder_columns
from .image_cache_dattn import DEFAULT_BYTES, DattnImageCache, hold_images
from .layers_dattn import DattnRMSNorm
from .layout_dattn import Rows
from .samples_dattn import check_pixels, check_tiles, one_after_another
from .shared_attention_dattn import attend_shared  # noqa: F401
from .shared_images_dattn import SharedImages  # noqa: F401
from .text_dattn import DattnTextModel
from .visual_dattn import (
    DattnProjector,
    build_vision_tower,
    place_images,
    place_rows,
    tower_features,
)


class DattnPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the classes below."""

    config_class = DattnConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    _no_split_modules = [DattnDecoderLayer.__name__]  # the vision tower adds its own
    # The cache's name in transformers before 5.24 and after, and between this model's parts.
    _skip_keys_device_placement = ["past_key_values", "cache", "dattn_cache"]
    _keep_in_fp32_modules_strict = ["row_position", "column_position"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """See transformers, which leaves weights that a folder lacks at random values.

        Raises:
            ValueError: weights are missing, and the caller does not ask for `output_loading_info`.
        """
        asked = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if asked:
            return model, info
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{len(missing)} weights are missing ({', '.join(missing[:3])}, ...) and would "
                f"stay random; copy the folder again, or see output_loading_info ({releases()})"
            )
        return model

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """See torch; position embeddings stay float32, as `from_pretrained` keeps them.

        They are embedded in float32, and rounded weights would move every visual row.
        """
        kept = [
            (weight, weight.detach().clone(), None if weight.grad is None else weight.grad.clone())
            for name, weight in self.named_parameters()
            if weight.dtype == torch.float32
            and any(part in name.split(".") for part in self._keep_in_fp32_modules_strict)
        ]
        moved = super().to(*args, **kwargs)
        for weight, wide, gradient in kept:
            if weight.dtype.is_floating_point and weight.dtype.itemsize < wide.dtype.itemsize:
                weight.data = wide.to(weight.device)
                if gradient is not None:
                    weight.grad = gradient.to(weight.device)
        return moved

    def half(self) -> Any:
        """See torch and `to`."""
        return self.to(torch.float16)

    def bfloat16(self) -> Any:
        """See torch and `to`."""
        return self.to(torch.bfloat16)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DattnRMSNorm):
            init.constant_(module.weight, module.initial)


class DattnModel(DattnPreTrainedModel):
    """Vision tower, projector and language model, without the output head."""

    def __init__(self, config: DattnConfig) -> None:
        super().__init__(config)
        self.vision_tower = build_vision_tower(config)
        self.multi_modal_projector = DattnProjector(config)
        self.language_model = DattnTextModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of text tokens."""
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding of text tokens."""
        self.language_model.embed_tokens = value

    def get_image_features(
        self, pixel_values: Tensor, image_grids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Visual rows [rows, hidden] of each image.

        Args:
            pixel_values: normalised tiles [tiles of all images, 3, height, width]; of each image
                the base view first, then the tiles of its canvas row by row.
            image_grids: int64 [images, 2], columns and rows of each canvas in tiles, 0 and 0 for
                an image of one tile; None: every tile is an image.

        Raises:
            ValueError: the tiles are not as many as the grids say.
        """
        if image_grids is None:
            image_grids = torch.zeros(len(pixel_values), 2, dtype=torch.long)
        check_tiles(pixel_values, image_grids)
        class_row = self.config.vision_features["class_row"]
        features = tower_features(self.vision_tower, pixel_values, class_row)
        return self.multi_modal_projector(features, image_grids.tolist())

    def visual_state(self) -> tuple[Any, ...]:
        """A value that changes with whatever an image's keys and values come from."""
        return state_of(
            self, [self.vision_tower, self.multi_modal_projector, self.language_model.layers]
        )

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: DattnCache | None = None,
        image_grids: Tensor | None = None,
        position_ids: Tensor | None = None,
        every_layer: bool = False,
        image_cache: DattnImageCache | None = None,
        last_columns: int = 0,
    ) -> tuple[Tensor, ...]:
        """Hidden states of the columns of `input_ids`, or of the last ones alone.

        See `DattnForConditionalGeneration` and, for what it returns, `DattnTextModel`.
        """
        new_mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        image_starts = placeholder_columns(self.config, input_ids, new_mask)
        text_live = torch.ones_like(image_starts) if new_mask is None else new_mask.bool()
        text_live = text_live.to(image_starts.device) & ~image_starts
        embedded = self.get_input_embeddings()(input_ids.masked_fill(~text_live, 0))
        images_before: Tensor | int = 0
        if cache is not None and cache.image_starts is not None:
            images_before = cache.image_starts.long().sum(1)
        counts = image_starts.sum(1)
        images: Sequence[Any] = ()
        if pixel_values is not None:
            pixel_values = pixel_values.to(embedded.dtype)
            if pixel_values.ndim == 5:
                pixel_values, image_grids = one_after_another(pixel_values, image_grids, counts)
            if len(pixel_values) and image_cache is not None:
                images = image_cache.images(self, pixel_values, image_grids, embedded)
            elif len(pixel_values):
                images = self.get_image_features(pixel_values, image_grids)
        if len(images) != int(counts.sum()):
            raise ValueError(
                f"input_ids hold {int(counts.sum())} image placeholders (token "
                f"{self.config.image_token_id}), but pixel_values hold {len(images)} images; "
                "pass one image per placeholder"
            )
        if image_cache is None or not images:
            if cache is not None and images:
                cache.unshare()
            lengths = [len(image) for image in images]
            live, image_of_row = place_rows(lengths, counts, images_before, embedded.device)
            visual = place_images(images, live, embedded)
        else:  # no row is new: their keys and values are there in every layer
            cache = DattnCache() if cache is None else cache
            live, image_of_row = hold_images(cache, images, counts, images_before)
            visual = embedded.new_zeros(len(live), 0, embedded.shape[-1])
        rows: Rows = (text_live, image_starts, live, image_of_row)
        return self.language_model(
            embedded, visual, rows, cache, position_ids, every_layer, last_columns
        )


class DattnForConditionalGeneration(DattnPreTrainedModel, DattnGenerationMixin):
    """The model with its output head: logits, loss and `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: DattnConfig) -> None:
        super().__init__(config)
        self.model = DattnModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()
        if config.image_token_id < text.vocab_size:  # the model must not answer with an image
            self.generation_config.suppress_tokens = [config.image_token_id]

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of text tokens."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding of text tokens."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The output head."""
        return self.lm_head

    def get_image_features(
        self, pixel_values: Tensor, image_grids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Visual rows [rows, hidden] of each image; see `DattnModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_grids)

    def make_image_cache(self, max_bytes: int = DEFAULT_BYTES) -> DattnImageCache:
        """An empty cache of images' keys and values, for `generate(..., image_cache=cache)`."""
        return DattnImageCache(max_bytes)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        image_grids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        image_columns: Tensor | None = None,
        image_cache: DattnImageCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Computes logits of the new columns.

        Args:
            input_ids: int64 [batch, columns]; with a cache, the new columns only.
            pixel_values: normalised tiles [tiles, 3, height, width] of the new columns' images; or
                [batch, most tiles, 3, height, width], sample by sample.
            attention_mask: [batch, columns], 0 for padding (left or right); with a cache it may
                cover the earlier columns too.
            past_key_values: cache of the earlier columns, extended in place. An empty
                `DynamicCache` is replaced by a `DattnCache`, which the output holds.
            labels: int64 [batch, columns], tokens as in `input_ids` or -100; shifted here to the
                next text row, so that an image between two text rows changes nothing. What stands
                at images and padding does not count; `DattnProcessor` masks it on request.
            use_cache: whether to make (or go on with) a cache; None: as the configuration says,
                and not in training.
            logits_to_keep: compute the last n logits only; 0: all.
            return_dict: False: a tuple instead of the output object; None: as the configuration
                says.
            image_grids: int64 [images, 2], columns and rows of each image's canvas in tiles; None:
                every tile is an image. Sample by sample: [batch, most images, 2], padded with -1.
            num_items_in_batch: what the summed loss is divided by; None: the labels that count.
                transformers' Trainer gives it where several forward passes make one step, and
                counts all labels but -100: those at images and padding are refused then.
            output_hidden_states: whether to return hidden states of the text columns, the
                embeddings first and the last ones normed; None: as the configuration says. What
                they hold at images and padding means nothing.
            image_columns: bool [batch, columns], columns that are images whatever their id is.
            image_cache: keys and values of images that were shown before, in any conversation;
                what it lacks is computed and kept. See `DattnImageCache`.
            **kwargs: a cache under another name, and what transformers passes to every model; see
                `check_further`. `position_ids` must be those that the model derives.

        Raises:
            ValueError: images and placeholders, or tiles and grids, differ in number, the cache is
                of another kind, or an argument is not honoured.
        """
        named = [value for value in kwargs.values() if is_cache(value)]
        cache = own_cache([past_key_values, *named])
        if use_cache is False and cache is not None:
            raise ValueError("use_cache is False, but a cache is given; leave one of them out")
        if use_cache is None:  # as transformers' own models do where the loop is the user's
            use_cache = labels is None and not self.training
            use_cache = use_cache and getattr(self.config.text_config, "use_cache", True)
        if cache is None and use_cache:
            cache = DattnCache()
        if getattr(self.config, "output_attentions", False):
            kwargs.setdefault("output_attentions", True)
        position_ids = kwargs.pop("position_ids", None)
        past = 0 if cache is None else cache.get_seq_length()
        check_further(kwargs, past, input_ids)
        check_shapes(input_ids, attention_mask, labels, logits_to_keep, cache)
        check_pixels(pixel_values)
        if image_cache is not None and not isinstance(image_cache, DattnImageCache):
            raise ValueError(
                f"image_cache is a {type(image_cache).__name__}; it must be a DattnImageCache, "
                "which model.make_image_cache() makes"
            )
        if image_grids is not None and pixel_values is None:
            raise ValueError("image_grids come without pixel_values; give both, or leave both out")
        if image_columns is not None:
            if image_columns.shape != input_ids.shape:
                raise ValueError(
                    f"image_columns have shape {list(image_columns.shape)}, but input_ids "
                    f"{list(input_ids.shape)}"
                )
            input_ids = input_ids.masked_fill(image_columns, self.config.image_token_id)
        if output_hidden_states is None:
            output_hidden_states = bool(getattr(self.config, "output_hidden_states", False))
        if return_dict is None:
            return_dict = bool(getattr(self.config, "return_dict", True))
        last = logits_to_keep if labels is None and isinstance(logits_to_keep, int) else 0
        states = self.model(
            input_ids,
            pixel_values,
            attention_mask,
            cache,
            image_grids,
            position_ids,
            output_hidden_states,
            image_cache,
            last,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(states[-1][:, keep])
        cap = getattr(self.config.text_config, "final_logit_softcapping", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        loss = None
        if labels is not None:
            live = ~placeholder_columns(self.config, input_ids, None)
            if attention_mask is not None:
                live &= attention_mask[:, -input_ids.shape[1] :].to(live.device).bool()
            if num_items_in_batch is not None:
                check_counted(labels, live)
            loss = next_token_loss(logits, labels, live, num_items_in_batch)
        held: dict[str, Any] = {} if cache is None else {cache_field(): cache}
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=states if output_hidden_states else None, **held
        )
        return output if return_dict else output.to_tuple()


def next_token_loss(
    logits: Tensor,
    labels: Tensor,
    live: Tensor,
    num_items_in_batch: Tensor | int | None,
) -> Tensor:
    """Cross-entropy of each text row's next text row, averaged over the labels that count."""
    rows = [(logits[i, row][:-1], labels[i, row][1:]) for i, row in enumerate(live)]
    scores = torch.cat([row for row, _ in rows]).float()
    targets = torch.cat([target for _, target in rows])
    if len(targets) and int(targets.max()) >= scores.shape[1]:
        raise ValueError(
            f"labels hold token {int(targets.max())}, but the vocabulary has {scores.shape[1]} "
            "tokens; a label is a token, or -100"
        )
    if num_items_in_batch is None:
        return F.cross_entropy(scores, targets)
    total = F.cross_entropy(scores, targets, reduction="sum")
    return total / torch.as_tensor(num_items_in_batch, device=total.device)


__all__ = ["DattnForConditionalGeneration", "DattnModel", "DattnPreTrainedModel"]
