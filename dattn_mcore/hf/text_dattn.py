"""The language model's stack: embedding, decoder layers and last norm over text and visual rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import (
    Gemma2RMSNorm,
    Gemma2RotaryEmbedding,
    Gemma2TextScaledWordEmbedding,
)
from transformers.models.mistral.modeling_mistral import (
    MistralRMSNorm,
    MistralRotaryEmbedding,
)

from .attention_dattn import DattnDecoderLayer
from .configuration_dattn import DattnConfig
from .layout_dattn import DattnCache, Layout, Rows, build_layout


class DattnTextModel(nn.Module):
    """The language model's stack over text columns and visual rows."""

    def __init__(self, config: DattnConfig) -> None:
        super().__init__()
        self.config = config
        text: Any = config.text_config
        vocab, hidden, pad = text.vocab_size, text.hidden_size, text.pad_token_id
        self.embed_tokens: nn.Module
        self.norm: nn.Module
        self.rotary_emb: nn.Module
        if text.model_type == "gemma2":
            self.embed_tokens = Gemma2TextScaledWordEmbedding(vocab, hidden, pad, hidden**0.5)
            self.norm = Gemma2RMSNorm(hidden, eps=text.rms_norm_eps)
            self.rotary_emb = Gemma2RotaryEmbedding(text)
        else:
            self.embed_tokens = nn.Embedding(vocab, hidden, pad)
            self.norm = MistralRMSNorm(hidden, eps=text.rms_norm_eps)
            self.rotary_emb = MistralRotaryEmbedding(text)
        self.layers = nn.ModuleList(
            DattnDecoderLayer(config, layer) for layer in range(text.num_hidden_layers)
        )

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer, in positions, the query included; None: no window."""
        text = self.config.text_config
        types = getattr(text, "layer_types", None)
        if types is not None and types[layer] != "sliding_attention":
            return None
        return text.sliding_window

    def forward(
        self,
        text: Tensor,
        visual: Tensor,
        rows: Rows,
        cache: DattnCache | None,
    ) -> Tensor:
        """Runs all layers.

        Args:
            text: embeddings of the new text columns [batch, columns, hidden].
            visual: new visual rows [batch, visual rows, hidden].
            rows: what stands in the new columns and rows: (text_live, image_starts, visual_live,
                visual_image), see `DattnCache`.
            cache: earlier rows, extended in place; None: there are none.

        Returns:
            Normed hidden states of the new text columns.
        """
        shared_axis = self.config.t2v_position == "rope"
        layout = build_layout(
            rows if cache is None else cache.extend_rows(rows),
            new_text=text.shape[1],
            new_visual=visual.shape[1],
            causal_v2v=self.config.v2v == "causal",
            shared_axis=shared_axis,
        )
        text_rotation = self.rotary_emb(text, layout.text_position[:, -text.shape[1] :])
        visual_rotation = self.rotary_emb(text, layout.visual_position)
        layouts: dict[int | None, Layout] = {None: layout}
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            window = self.window(number)
            if window is not None and window not in layouts:
                layouts[window] = layout.windowed(window, shared_axis)
            text, visual = layer(
                text,
                visual,
                layout=layouts[window],
                text_rotation=text_rotation,
                visual_rotation=visual_rotation,
                past_key_values=cache,
                visual_output=number < last,
            )
        return self.norm(text)


__all__ = ["DattnTextModel"]
