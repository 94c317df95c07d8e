"""The language model's stack: embedding, decoder layers and last norm over text and visual rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .arguments_dattn import check_positions
from .attention_dattn import DattnDecoderLayer
from .cache_dattn import DattnCache
from .configuration_dattn import DattnConfig
from .layers_dattn import DattnEmbedding, DattnRMSNorm, DattnRotary
from .layout_dattn import Layout, Rows, build_layout


class DattnTextModel(nn.Module):
    """The language model's stack over text columns and visual rows."""

    def __init__(self, config: DattnConfig) -> None:
        super().__init__()
        self.config = config
        text: Any = config.text_config
        features: Any = config.text_features
        scale = text.hidden_size**0.5 if features["scale_embeddings"] else None
        self.embed_tokens: nn.Module = DattnEmbedding(
            text.vocab_size, text.hidden_size, text.pad_token_id, scale
        )
        centred = features["zero_centered_gamma"]
        self.norm = DattnRMSNorm(text.hidden_size, text.rms_norm_eps, zero_centred=centred)
        ropes = text.rope_parameters  # of each kind of layer, or of all layers
        ropes = {"all_layers": ropes} if "rope_type" in ropes else dict(ropes)
        ropes["not_rotated"] = {"rope_type": "none", "rope_theta": 1.0}
        self.rotary_kinds = [self.rotary_kind(n) for n in range(text.num_hidden_layers)]
        self.rotary_emb = nn.ModuleDict(  # each worked out once a pass
            {
                kind: DattnRotary(text.head_dim, ropes[kind])
                for kind in dict.fromkeys(self.rotary_kinds)
            }
        )
        self.layers = nn.ModuleList(
            DattnDecoderLayer(config, layer) for layer in range(text.num_hidden_layers)
        )

    @property
    def replays_layers(self) -> bool:
        """Whether the layers keep no activations for the backward pass."""
        return any(layer.gradient_checkpointing for layer in self.layers)

    def layer_type(self, layer: int) -> str:
        """`sliding_attention` or `full_attention`."""
        text = self.config.text_config
        types = getattr(text, "layer_types", None)
        if types is not None:
            return types[layer]
        window = getattr(text, "sliding_window", None)
        return "full_attention" if window is None else "sliding_attention"

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer, in positions, the query included; None: no window."""
        sliding = self.layer_type(layer) == "sliding_attention"
        return self.config.text_config.sliding_window if sliding else None

    def rotary_kind(self, layer: int) -> str:
        """Whose rotary positions a layer has: all layers', its type's, or none."""
        text = self.config.text_config
        rotated = getattr(text, "no_rope_layers", None)  # 0 where there are none
        if rotated is not None and not rotated[layer]:
            return "not_rotated"
        return "all_layers" if "rope_type" in text.rope_parameters else self.layer_type(layer)

    def forward(
        self,
        text: Tensor,
        visual: Tensor,
        rows: Rows,
        cache: DattnCache | None,
        position_ids: Tensor | None = None,
        every_layer: bool = False,
        last_columns: int = 0,
    ) -> tuple[Tensor, ...]:
        """Runs all layers.

        Args:
            text: embeddings of the new text columns [batch, columns, hidden].
            visual: new visual rows [batch, visual rows, hidden].
            rows: what stands in the new columns and rows: (text_live, image_starts, visual_live,
                visual_image), see `DattnCache`.
            cache: earlier rows, extended in place; None: there are none.
            position_ids: positions of the new columns that a caller gives; they must be those that
                follow from the rows.
            every_layer: whether to keep all hidden states, or the last only.
            last_columns: without `every_layer`, how many of the last columns are wanted: in the
                last layer the others are only keys. 0: all.

        Returns:
            Hidden states of the wanted text columns: of `every_layer` the embeddings and what each
            layer gives, the last one normed; else the last one alone.

        Raises:
            ValueError: the positions are others, or a cache would be filled twice.
        """
        columns = text.shape[1]
        replayed = self.training and torch.is_grad_enabled() and self.replays_layers
        if cache is not None and replayed:
            raise ValueError(
                "gradient checkpointing runs each layer twice, which fills the cache twice; "
                "pass no cache and no use_cache, or turn it off"
            )
        shared_axis = self.config.t2v_position == "rope"
        layout = build_layout(
            rows if cache is None else cache.extend_rows(rows),
            new_text=columns,
            new_visual=visual.shape[1],
            causal_v2v=self.config.v2v == "causal",
            shared_axis=shared_axis,
        )
        if cache is not None and cache.shared is not None:
            layout.readers = cache.shared.readers(layout.images_before)
        check_positions(position_ids, layout.text_position[:, -columns:], rows[0])
        rotations = {
            kind: (
                rotary(layout.text_position[:, -columns:], text.dtype),
                rotary(layout.visual_position, text.dtype),
            )
            for kind, rotary in self.rotary_emb.items()
        }
        layouts: dict[int | None, Layout] = {None: layout}
        states = [text]
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            window = self.window(number)
            text_rotation, visual_rotation = rotations[self.rotary_kinds[number]]
            if window is not None and window not in layouts:
                layouts[window] = layout.windowed(window, shared_axis)
            seen = layouts[window]
            if number == last and 0 < last_columns < columns and not every_layer:
                seen = seen.of_last(last_columns)
                if cache is not None and cache.shared is not None:
                    seen.readers = cache.shared.readers(seen.images_before)
            text, visual = layer(
                text,
                visual,
                layout=seen,
                text_rotation=text_rotation,
                visual_rotation=visual_rotation,
                dattn_cache=cache,
                visual_output=number < last,
            )
            if every_layer and number < last:
                states.append(text)
        text = self.norm(text)
        return (*states, text) if every_layer else (text,)


__all__ = ["DattnTextModel"]
