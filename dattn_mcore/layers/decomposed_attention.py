"""D-Attn's self-attention as a Megatron-Core submodule.

The hidden state is `[V; T]`: visual rows, then text rows, in one tensor [rows, 1, hidden]. Only
text rows ask (`linear_q`), all rows answer (`linear_kv`, one GEMM), all rows are projected
(`linear_proj`, folded for visual rows). Under sequence parallelism a rank holds
`[V_shard; T_shard]`. Visual rows can also go through a layer on their own, chunk by chunk; see
`layers.visual_rows`.

Source: arXiv 2502.01906, section 3 (V2V diagonalisation, T2V debiasing, alpha weighting).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size

from dattn_mcore.architectures.features import HeadAxis
from dattn_mcore.architectures.sizes import RopeConfig
from dattn_mcore.layers.attention import (
    BACKENDS,
    AttentionInputs,
    AttentionOptions,
    Backend,
    Rotary,
    choose_backend,
)
from dattn_mcore.layers.attention.context import attend_in_context
from dattn_mcore.layers.layout import (
    DecomposedSeqParams,
    VisualChunk,
    interleave_shards,
    split_shards,
)
from dattn_mcore.layers.qk_norm import build_qk_norm

logger = logging.getLogger(__name__)


@dataclass
class DecomposedSelfAttentionSubmodules:
    """The projections (column, column, row parallel), and the norm of a head where there is one."""

    linear_q: ModuleSpec | type
    linear_kv: ModuleSpec | type
    linear_proj: ModuleSpec | type
    head_norm: ModuleSpec | type | None = None


class DecomposedSelfAttention(MegatronModule):
    """Self-attention over `[V; T]` in which visual rows are linear in cost.

    Parameters, per tensor parallel rank: `linear_q` [heads/tp * head_dim, hidden]; `linear_kv`
    [groups/tp * 2 * head_dim, hidden], each group's key rows before its value rows; `linear_proj`
    [hidden, heads/tp * head_dim]. `q_layernorm` and `k_layernorm` are whole on every rank.

    Where there are more ranks than groups, several ranks share a group: the rows of `linear_kv` are
    shared over all of them as ever, no rank holds a weight that another holds, and keys and values
    are gathered before a rank takes its group's.

    Args:
        config: Megatron-Core's layer configuration.
        submodules: the projections.
        layer_number: 1-based number in the whole model.
        options: attention mode, scale, soft-cap; without a window.
        windows: sliding window of each layer of the whole model, None for none; empty: no layer
            has one.
        rotary_kinds: which of the kinds in `rotary_pos_emb` each layer of the whole model takes;
            empty: there is one.
        ropes: how each layer of the whole model stretches its positions; empty: none does.
        backend: name of the attention backend, or auto.
        fold: project visual rows with folded weights (`layers.linear`); the `linear_proj` of
            `submodules` must be able to. Concerns `v2v=diagonal` only.
        text_only: return text rows only: the last layer, whose visual rows nobody reads.
        qk_norm: axes of queries and keys that are normed together (`layers.qk_norm`); empty: they
            are not normed.
        pg_collection: process groups; `tp` and `cp` are used.
        cp_comm_type, pp_layer_offset, name: what Megatron-Core's layer passes to any attention
            (the last two from 0.17 on), without a meaning here.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: DecomposedSelfAttentionSubmodules,
        layer_number: int,
        options: AttentionOptions,
        windows: Sequence[int | None] = (),
        rotary_kinds: Sequence[int] = (),
        ropes: Sequence[RopeConfig] = (),
        backend: str = "auto",
        fold: bool = False,
        text_only: bool = False,
        qk_norm: Sequence[HeadAxis] = (),
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.layer_number = layer_number
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        if get_pg_size(self.cp_group) > 1 and options.v2v != "diagonal":
            raise ValueError(
                f"v2v={options.v2v!r} cannot go with context parallelism, which divides visual "
                "rows that do not see each other"
            )
        tp_size = get_pg_size(self.tp_group)
        self.head_dim = config.kv_channels
        self.heads = config.num_attention_heads // tp_size
        self.ranks_per_group = max(1, tp_size // config.num_query_groups)
        self.groups = max(1, config.num_query_groups // tp_size)
        window = windows[layer_number - 1] if windows else None
        self.options = replace(options, window=window)
        self.rotary_kind = rotary_kinds[layer_number - 1] if rotary_kinds else 0
        self.rope = ropes[layer_number - 1] if ropes else RopeConfig()
        self.fold, self.text_only = fold and options.v2v == "diagonal", text_only
        if text_only and self.options.window is None:
            # Nobody reads what visual rows would attend to. (The flash kernels know windows only
            # where all rows ask.)
            self.options = replace(self.options, v2v="diagonal")
        self.sequence_shards = tp_size if config.sequence_parallel else 1
        self.recompute_core = (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )
        self._requested_backend = backend
        self._backend: Backend | None = None
        column = dict(
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=config.add_qkv_bias,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )
        query_size = config.num_attention_heads * self.head_dim
        kv_size = 2 * config.num_query_groups * self.head_dim
        self.linear_q = build_module(submodules.linear_q, config.hidden_size, query_size, **column)
        self.linear_kv = build_module(submodules.linear_kv, config.hidden_size, kv_size, **column)
        self.linear_proj = build_module(
            submodules.linear_proj,
            query_size,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_group=self.tp_group,
        )
        # The names are those by which Megatron-Core knows that these gradients are summed over
        # tensor parallel ranks, which have different heads.
        self.q_layernorm, self.k_layernorm = (
            build_qk_norm(
                qk_norm,
                submodules.head_norm,
                config=config,
                heads=heads,
                tp_group=self.tp_group,
            )
            for heads in (config.num_attention_heads, config.num_query_groups)
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        rotary_pos_emb: torch.Tensor,
        packed_seq_params: DecomposedSeqParams | VisualChunk,
        **unused: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends.

        Args:
            hidden_states: [(V + T) / sequence shards, 1, hidden], `[V; T]` on every shard.
            attention_mask: unused; visibility is in `packed_seq_params`.
            rotary_pos_emb: angles [V + T, 1, 1, kinds * head_dim] of all rows of the pack, for
                each kind of rotary positions that the model's layers have.
            packed_seq_params: rows of the pack and what they see. A `VisualChunk`:
                `hidden_states` are visual rows alone. One with `visual` set: they are text rows
                alone, and the visual rows' keys and values are those.
            **unused: what Megatron-Core passes for inference.

        Rows are those of a context parallel rank, where `packed_seq_params` says that it has some
        of a pack; the attention alone asks the others.

        Returns:
            The projected output, shaped as the input (text rows only with `text_only`), and no
            bias.
        """
        if isinstance(packed_seq_params, VisualChunk):
            return self._visual_chunk(hidden_states, packed_seq_params)
        params = packed_seq_params
        alone = params.visual is not None
        visual_here = 0 if alone else params.num_visual // self.sequence_shards
        # Visual rows never pay for a query, unless the baseline wants one.
        causal_visual = self.options.v2v == "causal"
        q, _ = self.linear_q(hidden_states if causal_visual else hidden_states[visual_here:])
        kv = self.keys_values(hidden_states)
        if params.visual is None:
            kv_visual, kv_text = split_shards(kv, params.num_visual, self.sequence_shards)
        else:
            kv_visual, kv_text = params.visual.keys_values(self.layer_number), kv
        q_visual = None
        if causal_visual:
            q_visual, q = split_shards(q, params.num_visual, self.sequence_shards)
            q_visual = q_visual.view(-1, self.heads, self.head_dim)
        q = q.view(-1, self.heads, self.head_dim)
        text, visual = self._attend(q, kv_text, kv_visual, q_visual, rotary_pos_emb, params)
        text = text.reshape(-1, 1, self.heads * self.head_dim)
        if alone or self.text_only:
            return self.linear_proj(text)
        if visual is not None:
            rows = interleave_shards(
                visual.reshape(-1, *text.shape[1:]), text, self.sequence_shards
            )
            return self.linear_proj(rows)
        return self._project(kv_visual, text)

    def set_for_recompute_input_layernorm(self) -> None:
        """Has the linears keep the norm's output, not an FP8 copy, so that it can be dropped.

        `TransformerLayer` calls it where the norm is computed again in an FP8 run; the MLP's first
        linear it sets itself.
        """
        from megatron.core.extensions.transformer_engine import set_save_original_input

        set_save_original_input(self.linear_q)
        set_save_original_input(self.linear_kv)

    def keys_values(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Keys and values [rows, 1, groups / tp * 2 * head_dim] of normed rows (of this shard)."""
        kv, _ = self.linear_kv(hidden_states)
        if self.ranks_per_group == 1:
            return kv
        # Backward sums what the ranks of a group found, and leaves each its own rows of the weight.
        kv = tensor_parallel.all_gather_last_dim_from_tensor_parallel_region(
            kv, group=self.tp_group
        )
        group = get_pg_rank(self.tp_group) // self.ranks_per_group
        return kv.unflatten(-1, (-1, 2 * self.head_dim))[..., group, :]

    def _visual_chunk(
        self, hidden_states: torch.Tensor, chunk: VisualChunk
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        kv = self.keys_values(hidden_states)
        chunk.keys_values.append(kv)
        return self._project(kv, kv.new_empty(0, 1, self.heads * self.head_dim))

    def _project(
        self, kv_visual: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output of all rows with V2V diagonal: softmax over the one own key is 1."""
        own = self._by_group(kv_visual)[:, :, 1]
        if self.fold:
            return self.linear_proj(text, own.flatten(1)[:, None])
        visual = own.repeat_interleave(self.heads // self.groups, dim=1).flatten(1)[:, None]
        return self.linear_proj(interleave_shards(visual, text, self.sequence_shards))

    def _by_group(self, kv: torch.Tensor) -> torch.Tensor:
        return kv.view(kv.shape[0], self.groups, 2, self.head_dim)

    def _attend(
        self,
        q: torch.Tensor,
        kv_text: torch.Tensor,
        kv_visual: torch.Tensor,
        q_visual: torch.Tensor | None,
        angles: torch.Tensor,
        params: DecomposedSeqParams,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        n, first = params.num_visual, self.rotary_kind * self.head_dim
        angles = angles[..., first : first + self.head_dim]
        backend = self._choose_backend(q)
        k_t, v_t = self._by_group(kv_text).unbind(2)
        k_v, v_v = self._by_group(kv_visual).unbind(2)
        if self.q_layernorm is not None:
            q = self.q_layernorm(q)
            q_visual = None if q_visual is None else self.q_layernorm(q_visual)
        if self.k_layernorm is not None:
            k_t, k_v = self.k_layernorm(k_t), self.k_layernorm(k_v)

        def core(q, k_t, v_t, k_v, v_v, q_visual, angles):
            inputs = AttentionInputs(
                q=q,
                k_text=k_t,
                v_text=v_t,
                k_visual=k_v,
                v_visual=v_v,
                q_visual=q_visual,
                rotary=Rotary(text=angles[n:], visual=angles[:n], rope=self.rope),
                params=params,
            )
            if params.context is None:
                return backend.attend(inputs, self.options)
            return attend_in_context(inputs, self.options, backend, self.cp_group), None

        if self.recompute_core and self.training:
            return tensor_parallel.checkpoint(core, False, q, k_t, v_t, k_v, v_v, q_visual, angles)
        return core(q, k_t, v_t, k_v, v_v, q_visual, angles)

    def _choose_backend(self, q: torch.Tensor) -> Backend:
        if self._backend is None:
            choice = choose_backend(
                self._requested_backend, self.options, q.device.type, q.dtype, self.head_dim
            )
            self._backend = BACKENDS[choice.name]
            if self.layer_number == 1:
                logger.info("attention backend: %s (%s)", choice.name, choice.reason)
        return self._backend
