"""Decomposed causal self-attention over visual and text rows, and the decoder layer around it.

Source: Kuo et al., "D-Attn: Decomposed Attention for Large Vision-and-Language Models"
(arXiv 2502.01906). Text queries read text keys with rotary positions (T2T) and visual keys
(T2V, without positions unless `t2v_position` is rope); a visual row's output is its own value
(V2V diagonal) or, in the baseline, causal attention over what stands before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_dattn import DattnCache
from .configuration_dattn import DattnConfig
from .layers_dattn import (
    DattnMLP,
    DattnRMSNorm,
    Rotation,
    repeat_heads,
    rotate,
    rotate_queries,
)
from .layout_dattn import Layout
from .shared_attention_dattn import attend_shared, products


@dataclass
class KeySet:
    """A set of keys with the queries that read it.

    Attributes:
        query: [batch, heads, queries, head_dim].
        key: [batch, kv heads, keys, head_dim]; value likewise.
        visible: bool [batch, 1, queries, keys].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor


def attend(
    key_sets: list[KeySet],
    scale: float,
    softcap: float | None,
    merge: str,
    implementation: str,
) -> Tensor:
    """Attention over all key sets: one softmax over their union (`alpha`), or one each (`sum`).

    The union's softmax is the exact merge a * XA + (1 - a) * SA with a = sigmoid(lse_V - lse_T);
    a query that sees no key of a set gets nothing from it.

    Args:
        key_sets: those without keys are skipped.
        scale: factor of the logits.
        softcap: logits become softcap * tanh(logits / softcap); None: not capped.
        merge: `alpha` or `sum`.
        implementation: `sdpa` uses PyTorch's kernels for prompts without soft-cap.

    Returns:
        [batch, queries, heads * head_dim].
    """
    key_sets = [key_set for key_set in key_sets if key_set.key.shape[2] > 0]
    few = key_sets[0].query.shape[2] == 1  # a decoding step: its scores are small
    kernel = _sdpa if implementation == "sdpa" and softcap is None and not few else _eager
    if merge == "alpha" or len(key_sets) == 1:
        output = kernel(key_sets, scale, softcap)
    else:
        outputs = [_zero_if_blind(key_set, scale, softcap, kernel) for key_set in key_sets]
        output = torch.stack(outputs).sum(0)
    batch, _, queries, _ = output.shape
    return output.transpose(1, 2).reshape(batch, queries, -1)


def _zero_if_blind(key_set: KeySet, scale: float, softcap: float | None, kernel) -> Tensor:
    """The softmax of one set; zero for queries that see none of its keys."""
    seeing = key_set.visible.any(-1, keepdim=True)
    output = kernel(
        [KeySet(key_set.query, key_set.key, key_set.value, key_set.visible | ~seeing)],
        scale,
        softcap,
    )
    return torch.where(seeing, output, torch.zeros_like(output))


def _eager(key_sets: list[KeySet], scale: float, softcap: float | None) -> Tensor:
    """Plain attention with the scores in memory, softmax in at least float32; copies no keys."""
    batch, heads, queries, _ = key_sets[0].query.shape
    groups = key_sets[0].key.shape[1]

    def by_group(x: Tensor) -> Tensor:  # the heads of a group become rows
        return x.reshape(batch, groups, -1, x.shape[-1])

    logits = torch.cat([products(by_group(p.query), p.key, scale) for p in key_sets], dim=-1)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    visible = torch.cat([p.visible for p in key_sets], dim=-1)
    logits = logits.view(batch, heads, queries, -1)
    logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
    weights = by_group(torch.softmax(logits, dim=-1).to(key_sets[0].value.dtype))
    shares = weights.split([p.key.shape[2] for p in key_sets], dim=-1)
    outputs = [share @ p.value for share, p in zip(shares, key_sets, strict=True)]
    return torch.stack(outputs).sum(0).view(batch, heads, queries, -1)


def _sdpa(key_sets: list[KeySet], scale: float, softcap: float | None) -> Tensor:
    """The same through PyTorch's kernels.

    Two key sets with different queries (rotated for text, plain for visual keys) become one by
    stacking features: [q_a, q_b] . [k_a, 0] = q_a . k_a and [q_a, q_b] . [0, k_b] = q_b . k_b.
    """
    query, keys = key_sets[0].query, [p.key for p in key_sets]
    if any(p.query is not query for p in key_sets):
        query = torch.cat([p.query for p in key_sets], dim=-1)
        width = keys[0].shape[-1]
        keys = [
            F.pad(key, (i * width, (len(key_sets) - 1 - i) * width)) for i, key in enumerate(keys)
        ]
    groups = query.shape[1] // keys[0].shape[1]
    return F.scaled_dot_product_attention(
        query,
        repeat_heads(torch.cat(keys, dim=2), groups),
        repeat_heads(torch.cat([p.value for p in key_sets], dim=2), groups),
        attn_mask=torch.cat([p.visible for p in key_sets], dim=-1),
        scale=scale,
    )


class DattnAttention(nn.Module):
    """Self-attention of one layer over text columns and visual rows."""

    def __init__(self, config: DattnConfig, layer: int) -> None:
        super().__init__()
        text: Any = config.text_config
        features: Any = config.text_features
        self.config, self.layer = config, layer
        self.num_heads, self.num_kv_heads = (
            text.num_attention_heads,
            text.num_key_value_heads,
        )
        self.head_dim = text.head_dim
        self.scale = (getattr(text, "query_pre_attn_scalar", None) or self.head_dim) ** -0.5
        self.softcap = getattr(text, "attn_logit_softcapping", None)
        bias = features["qkv_bias"]
        self.q_proj = nn.Linear(text.hidden_size, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(text.hidden_size, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(text.hidden_size, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, text.hidden_size, bias=False)
        self.q_norm = self.k_norm = None
        if features["qk_norm"]:
            self.q_norm = self._norm(features, self.num_heads)
            self.k_norm = self._norm(features, self.num_kv_heads)

    def _norm(self, features: dict[str, Any], heads: int) -> DattnRMSNorm:
        """Of queries, or keys, of so many heads: over the axes that are normed together."""
        sizes = {"heads": heads, "head_dim": self.head_dim}
        size = math.prod(sizes[axis] for axis in features["qk_norm"])
        text: Any = self.config.text_config
        return DattnRMSNorm(size, text.rms_norm_eps, zero_centred=features["zero_centered_gamma"])

    def _heads(self, projected: Tensor, norm: DattnRMSNorm | None = None) -> Tensor:
        """[batch, heads, rows, head_dim], normed where there is a norm."""
        if norm is not None:
            together = projected.unflatten(-1, (-1, norm.weight.shape[0]))
            projected = norm(together).flatten(-2)
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        text: Tensor,
        visual: Tensor,
        layout: Layout,
        text_rotation: Rotation,
        visual_rotation: Rotation,
        dattn_cache: DattnCache | None,
        visual_output: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from the new rows to all rows.

        Args:
            text: normed new text columns [batch, columns, hidden]; `layout.new_text` of them, the
                last ones, are queries, and all are keys.
            visual: normed new visual rows [batch, new_visual, hidden].
            layout: who sees whom (already windowed for this layer).
            text_rotation: rotary factors of the new text columns.
            visual_rotation: those of all visual rows.
            dattn_cache: earlier keys and values; extended in place.
            visual_output: False in the last layer, where nobody reads the visual rows any more.

        Returns:
            Outputs of those text columns that are queries, and of the new visual rows (None if not
            asked for).
        """
        rope = self.config.t2v_position == "rope"
        causal = self.config.v2v == "causal"
        new_visual = layout.new_visual
        asking = text[:, text.shape[1] - layout.new_text :]
        query = self._heads(self.q_proj(asking), self.q_norm)
        text_key = self._heads(self.k_proj(text), self.k_norm)
        text_value = self._heads(self.v_proj(text))
        visual_key = self._heads(self.k_proj(visual), self.k_norm)
        new_value = visual_value = self._heads(self.v_proj(visual))

        rotated, text_key = rotate_queries(query, text_rotation), rotate(text_key, text_rotation)
        if rope and new_visual:
            visual_key = rotate(visual_key, visual_rotation)
        if dattn_cache is not None:
            text_key, text_value = dattn_cache.update(text_key, text_value, self.layer)
            visual_key, visual_value = dattn_cache.update_visual(
                visual_key, visual_value, self.layer
            )

        implementation = self.config._attn_implementation or "eager"
        text_keys = KeySet(rotated, text_key, text_value, layout.t2t)
        if dattn_cache is not None and dattn_cache.shared is not None:  # no visual row is new
            attended = attend_shared(
                query,
                text=(rotated, text_key, text_value, layout.t2t),
                shared=dattn_cache.shared,
                readers=layout.readers,
                layer=self.layer,
                scale=self.scale,
                softcap=self.softcap,
                merge=self.config.merge,
            )
            return self.o_proj(attended), None
        key_sets = [
            KeySet(rotated if rope else query, visual_key, visual_value, layout.t2v),
            text_keys,
        ]
        text_out = asking  # without columns, as where an image's rows are computed by themselves
        if asking.shape[1]:
            text_out = self.o_proj(
                attend(key_sets, self.scale, self.softcap, self.config.merge, implementation)
            )
        if not visual_output or not new_visual:
            return text_out, None
        if not causal:
            repeated = repeat_heads(new_value, self.num_heads // self.num_kv_heads)
            return text_out, self.o_proj(repeated.transpose(1, 2).flatten(2))
        assert layout.v2v is not None
        reader = rotate_queries(self._heads(self.q_proj(visual), self.q_norm), visual_rotation)
        if not rope:
            visual_key = rotate(visual_key, visual_rotation)
        key_sets = [KeySet(reader, visual_key, visual_value, layout.v2v)]
        if layout.v2t is not None:
            key_sets.append(KeySet(reader, text_key, text_value, layout.v2t))
        return text_out, self.o_proj(
            attend(key_sets, self.scale, self.softcap, "alpha", implementation)
        )


class DattnDecoderLayer(GradientCheckpointingLayer):
    """A decoder layer whose attention is decomposed."""

    def __init__(self, config: DattnConfig, layer: int) -> None:
        super().__init__()
        text: Any = config.text_config
        features: Any = config.text_features
        centred = features["zero_centered_gamma"]
        self.self_attn = DattnAttention(config, layer)
        self.mlp = DattnMLP(text, features["activation"])
        self.norms: dict[str, str | None] = features["norms"]
        for name in self.norms.values():
            if name is not None:
                norm = DattnRMSNorm(text.hidden_size, text.rms_norm_eps, zero_centred=centred)
                self.add_module(name, norm)

    def normed(self, place: str, rows: Tensor) -> Tensor:
        """The rows, normed where the layer has a norm at that place."""
        name = self.norms[place]
        return rows if name is None else self.get_submodule(name)(rows)

    def forward(self, text: Tensor, visual: Tensor, **attention) -> tuple[Tensor, Tensor]:
        """One layer over text columns and visual rows; what is not read does not come back.

        These are text columns that are no queries of the layout, and unread visual rows.
        """
        text_out, visual_out = self.self_attn(
            self.normed("attention_input", text),
            self.normed("attention_input", visual),
            **attention,
        )
        text = self.finish(text[:, text.shape[1] - text_out.shape[1] :], text_out)
        if visual_out is None:
            return text, visual[:, :0]
        return text, self.finish(visual, visual_out)

    def finish(self, residual: Tensor, branch: Tensor) -> Tensor:
        """Adds the attention's output, and the MLP's of the sum."""
        hidden = residual + self.normed("attention_output", branch)
        branch = self.mlp(self.normed("mlp_input", hidden))
        return hidden + self.normed("mlp_output", branch)


__all__ = ["DattnAttention", "DattnDecoderLayer", "KeySet", "attend"]
