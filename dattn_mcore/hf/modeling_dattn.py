"""The D-Attn vision-language model for transformers: text, images, `generate`.

`input_ids` holds one `config.image_token_id` per image, `pixel_values` the tiles of the images in
the same order over the whole batch, `image_grids` how many tiles each image has beside its base
view. A text row sees the images of its own sample that stand before it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.gemma2.modeling_gemma2 import (
    Gemma2RMSNorm,
    Gemma2TextScaledWordEmbedding,
)

# Some releases of transformers copy only what this file itself names to where they run it from:
# all neighbours are named here.
from .attention_dattn import DattnDecoderLayer
from .configuration_dattn import DattnConfig
from .layout_dattn import DattnCache
from .text_dattn import DattnTextModel
from .visual_dattn import DattnProjector, build_vision_tower, place_images, tower_features


class DattnPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the classes below."""

    config_class = DattnConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    _no_split_modules = [DattnDecoderLayer.__name__, "SiglipEncoderLayer", "CLIPEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["row_position", "column_position"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Gemma2RMSNorm):
            init.zeros_(module.weight)  # scales by 1 + weight
        elif isinstance(module, Gemma2TextScaledWordEmbedding):
            init.constant_(module.embed_scale, module.scalar_embed_scale)
        elif isinstance(module, DattnProjector):
            init.constant_(module.output_norm.weight, self.config.projector_output_norm_init)


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
        tiles = pixel_values.shape[0]
        grids = [[0, 0]] * tiles if image_grids is None else image_grids.tolist()
        expected = sum(1 + columns * rows for columns, rows in grids)
        if tiles != expected:
            raise ValueError(
                f"pixel_values hold {tiles} tiles, but image_grids name {expected} (a base view "
                "and columns x rows for each image); pass both as the processor gives them"
            )
        features = tower_features(self.vision_tower, pixel_values)
        return self.multi_modal_projector(features, grids)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: DattnCache | None = None,
        image_grids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of the columns of `input_ids`; see `DattnForConditionalGeneration`."""
        text_live = (
            torch.ones_like(input_ids, dtype=torch.bool)
            if attention_mask is None
            else attention_mask[:, -input_ids.shape[1] :].bool()
        )
        image_starts = (input_ids == self.config.image_token_id) & text_live
        text_live = text_live & ~image_starts
        embedded = self.get_input_embeddings()(input_ids.masked_fill(~text_live, 0))
        images_before: Tensor | int = 0
        if past_key_values is not None and past_key_values.image_starts is not None:
            images_before = past_key_values.image_starts.long().sum(1)
        images: tuple[Tensor, ...] = ()
        if pixel_values is not None:
            images = self.get_image_features(pixel_values.to(embedded.dtype), image_grids)
        counts = image_starts.sum(1)
        if len(images) != int(counts.sum()):
            raise ValueError(
                f"input_ids hold {int(counts.sum())} image placeholders (token "
                f"{self.config.image_token_id}), but pixel_values hold {len(images)} images; "
                "pass one image per placeholder"
            )
        visual, visual_live, visual_image = place_images(images, counts, images_before, embedded)
        rows = (text_live, image_starts, visual_live, visual_image)
        return self.language_model(embedded, visual, rows, past_key_values)


class DattnForConditionalGeneration(DattnPreTrainedModel, GenerationMixin):
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

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: DattnCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        image_grids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Computes logits of the new columns.

        Args:
            input_ids: int64 [batch, columns]; with a cache, the new columns only.
            pixel_values: normalised tiles [tiles, 3, height, width] of the new columns' images.
            attention_mask: [batch, columns], 0 for padding (left or right); with a cache it may
                cover the earlier columns too.
            past_key_values: cache of the earlier columns, extended in place.
            labels: int64 [batch, columns], tokens as in `input_ids` or -100; shifted here to the
                next text row, so that an image between two text rows changes nothing.
            use_cache: whether to make (or go on with) a cache.
            logits_to_keep: compute the last n logits only; 0: all.
            return_dict: False: a tuple instead of the output object.
            image_grids: int64 [images, 2], columns and rows of each image's canvas in tiles; None:
                every tile is an image.
            num_items_in_batch: what the summed loss is divided by; None: the labels that count.
                transformers' Trainer gives it where several forward passes make one step.
            **kwargs: what transformers passes to every model; not used.

        Raises:
            ValueError: if images and placeholders, or tiles and grids, differ in number, the
                cache is of another kind, or embeddings are given instead of ids.
        """
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "inputs_embeds is not supported; pass input_ids, which say where images stand"
            )
        if past_key_values is None and use_cache:
            past_key_values = DattnCache()
        if past_key_values is not None and not isinstance(past_key_values, DattnCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; this model keeps visual "
                "keys as well, so pass a DattnCache or nothing"
            )
        hidden = self.model(input_ids, pixel_values, attention_mask, past_key_values, image_grids)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        cap = getattr(self.config.text_config, "final_logit_softcapping", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, input_ids, attention_mask, num_items_in_batch)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return output.to_tuple() if return_dict is False else output

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """Cross-entropy of each text row's next text row, averaged over the labels that count."""
        live = input_ids != self.config.image_token_id
        if attention_mask is not None:
            live = live & attention_mask.bool()
        rows = [(logits[i, row][:-1], labels[i, row][1:]) for i, row in enumerate(live)]
        scores = torch.cat([row for row, _ in rows]).float()
        targets = torch.cat([target for _, target in rows])
        if num_items_in_batch is None:
            return F.cross_entropy(scores, targets)
        total = F.cross_entropy(scores, targets, reduction="sum")
        return total / torch.as_tensor(num_items_in_batch, device=total.device)

    def prepare_inputs_for_generation(
        self, *args: Any, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """See transformers; the cache holds the images after the first step."""
        inputs = super().prepare_inputs_for_generation(
            *args, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs["pixel_values"] = inputs["image_grids"] = None  # not done before 5.13
        return inputs

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic", "hybrid"):
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}; this model "
                "keeps visual keys as well and has the dynamic cache only"
            )
        if generation_config.use_cache is not False:
            model_kwargs.setdefault("past_key_values", None)
            if model_kwargs["past_key_values"] is None:
                model_kwargs["past_key_values"] = DattnCache()

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Any = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeats samples; images are repeated sample by sample, not one by one."""
        names = ("pixel_values", "image_grids")
        pixel_values, grids = (model_kwargs.pop(name, None) for name in names)
        if pixel_values is not None and expand_size > 1 and input_ids is not None:
            starts = input_ids == self.config.image_token_id
            if (mask := model_kwargs.get("attention_mask")) is not None:
                starts = starts & mask[:, -starts.shape[1] :].bool()
            images = tiles = starts.sum(1).tolist()
            if grids is not None:
                tiles = [int((1 + grid.prod(1)).sum()) for grid in grids.split(images)]
                grids = _repeat(grids, images, expand_size)
            pixel_values = _repeat(pixel_values, tiles, expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        for name, value in zip(names, (pixel_values, grids), strict=True):
            if value is not None:
                model_kwargs[name] = value
        return input_ids, model_kwargs


def _repeat(x: Tensor, per_sample: list[int], times: int) -> Tensor:
    """Repeats each sample's share of the first axis as a whole."""
    return torch.cat([share for share in x.split(per_sample) for _ in range(times)])


__all__ = ["DattnForConditionalGeneration", "DattnModel", "DattnPreTrainedModel"]
