"""The D-Attn vision-language model, one pipeline stage (or model chunk) at a time.

The first stage holds the vision tower, the projector and the text embedding; the last one the
final norm and the output layer. Between them travels one tensor, `[V; T]` [rows, 1, hidden].
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank

from dattn_mcore.architectures import text_features
from dattn_mcore.architectures.adapters import Adapters, adapted_linears
from dattn_mcore.architectures.parameters import part_of
from dattn_mcore.architectures.sizes import AttentionConfig, ModelConfig
from dattn_mcore.layers.adaptable import adapter_names, add_adapters
from dattn_mcore.layers.attention.frequencies import rotary_frequencies
from dattn_mcore.layers.attention.rotary import rotary_angles
from dattn_mcore.layers.layout import DecomposedSeqParams
from dattn_mcore.layers.runtime import Runtime
from dattn_mcore.layers.spec import block_submodules, decoder_layer_spec
from dattn_mcore.layers.visual_rows import DecomposedBlock
from dattn_mcore.layers.vocabulary import cap_and_mask, chunked_cross_entropy
from dattn_mcore.models.projector import Projector
from dattn_mcore.models.tile_share import TileShare
from dattn_mcore.models.tower_work import (
    group_of_tiles,
    groups_of_tower,
    mark_replicated,
    number_replicas,
)
from dattn_mcore.models.vision import VisionTower, normalize_pixels
from dattn_mcore.types import IGNORED_LABEL, Part, VisualShape


@dataclass
class ModelInputs:
    """One packed micro-batch on the device.

    Attributes:
        params: rows of the pack and what they see.
        text_ids: int64 [T], padded; the same on every tensor parallel rank. Of a pack that context
            parallel ranks divide, T are the rows of this one here and below.
        labels: int64 [T], the id each row must predict, -100 where there is no loss.
        tiles: uint8 [tiles, 3, size, size]; None off the first stage or without images. With
            `tile_share` those of this rank, of which there may be none.
        items: shape of each image and video; empty: every tile is an image of its own.
        groups: int64 [labelled rows], the group of samples that each loss belongs to; None: the
            loss is not divided by groups.
        num_groups: how many there are in the run.
        weights: float32 [labelled rows], what each loss counts; None: 1 each.
        tile_share: which tiles this rank encodes, and where their rows go; None: this rank has the
            whole pack.
    """

    params: DecomposedSeqParams
    text_ids: torch.Tensor
    labels: torch.Tensor
    tiles: torch.Tensor | None
    items: tuple[VisualShape, ...] = ()
    groups: torch.Tensor | None = None
    num_groups: int = 0
    weights: torch.Tensor | None = None
    tile_share: TileShare | None = None


class DattnModel(LanguageModule):
    """Vision tower, projector and decomposed-attention language model.

    Args:
        model: what it is: family and sizes.
        attention: how its attention is decomposed.
        runtime: how it is computed.
        transformer_config: Megatron-Core's configuration of the language model, from these; the
            chunks of a stage share one, which drives the pipeline schedule.
        pg_collection: process groups.
        pre_process: this chunk embeds (first stage).
        post_process: this chunk computes logits (last stage).
        vp_stage: number of this chunk in the interleaved schedule; None without it.
        adapters: of the language model's linears; None: there are none.
    """

    def __init__(
        self,
        model: ModelConfig,
        attention: AttentionConfig,
        runtime: Runtime,
        transformer_config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        super().__init__(config=transformer_config, pg_collection=pg_collection)
        self.runtime, llm = runtime, model.llm
        self.has_adapters = adapters is not None
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = llm.tie_embeddings
        self.sequence_parallel = transformer_config.sequence_parallel
        self.vocab_size, self.final_softcap = llm.vocab_size, llm.final_softcap
        self.scale_embeddings = text_features(model).scale_embeddings
        padded_vocab = llm.padded_vocab_size
        if pre_process:
            of_tower = groups_of_tower(pg_collection, runtime.tower)
            self.vision = VisionTower(model, runtime, of_tower)
            self.projector = Projector(model, runtime, of_tower)
            if self.tower_is_replicated:
                mark_replicated([self.vision, self.projector])
            self.embedding = LanguageModelEmbedding(
                config=transformer_config,
                vocab_size=padded_vocab,
                max_sequence_length=0,
                position_embedding_type="rope",
                tp_group=self.tp_group,
            )
        num_layers = get_num_layers_to_build(
            transformer_config, vp_stage, get_pg_rank(pg_collection.pp)
        )
        spec = functools.partial(
            decoder_layer_spec, model, attention, runtime, adaptable=self.has_adapters
        )
        layers = [spec()] * num_layers
        if post_process and layers:
            layers[-1] = spec(last=True)
        self.decoder = DecomposedBlock(
            visual_chunk=runtime.recompute.visual_chunk,
            config=transformer_config,
            spec=block_submodules(layers, runtime),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        if adapters is not None:
            linears = adapted_linears(model, adapters)
            add_adapters(self.decoder.layers, adapters, linears, self.tp_group)
        if post_process:
            # The rows that carry a label are gathered before the output layer, so this one
            # layer works on whole rows even under sequence parallelism.
            output_config = copy.copy(transformer_config)
            output_config.sequence_parallel = False
            output_config.gradient_accumulation_fusion = False  # the loss has its own products
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                llm.hidden_size,
                padded_vocab,
                config=output_config,
                init_method=transformer_config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process and llm.tie_embeddings,
                tp_group=self.tp_group,
            )
        frequencies = [rotary_frequencies(llm.head_dim, *rope) for rope in llm.ropes]
        self.register_buffer("inv_freq", torch.stack(frequencies), persistent=False)
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    @property
    def tower_is_replicated(self) -> bool:
        """Whether tensor parallel ranks each have the whole tower and projector of this chunk."""
        several = self.tp_group.size() > 1
        return self.pre_process and several and self.runtime.tower == "tiles"

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict | None = None,
    ) -> dict[str, Any]:
        """Parameters as a checkpoint has them, the same in every layout."""
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.tower_is_replicated:
            number_replicas(entries, self.tp_group)
        return entries

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Receives the hidden state of the stage before; called by the pipeline schedule."""
        if isinstance(input_tensor, list):
            input_tensor = input_tensor[0]
        self.decoder.set_input_tensor(input_tensor)

    def forward(self, inputs: ModelInputs, return_logits: bool = False) -> torch.Tensor:
        """Runs this chunk.

        Args:
            inputs: the micro-batch.
            return_logits: on the last stage, return logits instead of losses.

        Returns:
            Between stages the hidden state [(V + T) / tp with sp, 1, hidden]. On the last stage
            float32 losses [labelled rows] (never empty; a pack without labels gives one zero),
            or logits [T, padded vocabulary / tp] of all text rows.

        Raises:
            RuntimeError: gradients are to be added into DDP's buffers, and there are none.
        """
        if self.runtime.gradient_accumulation_fusion and torch.is_grad_enabled():
            self._check_buffers()
        params = inputs.params
        positions = torch.cat([params.visual_positions, params.text_positions])
        embedded = self._embed(inputs) if self.pre_process else None
        if embedded is not None and self._must_learn(embedded):
            embedded.requires_grad_()
        hidden = self.decoder(
            hidden_states=embedded,
            attention_mask=None,
            rotary_pos_emb=self.angles(positions),
            packed_seq_params=params,
        )
        if not self.post_process:
            return hidden
        text = self._text_rows(hidden, params)
        if return_logits:
            return self._logits(text)[:, 0]
        return self._losses(text, inputs.labels)

    def _check_buffers(self) -> None:
        """Fused products look for a buffer in backward, where nobody says what is wrong."""
        learning = (p for p in self.decoder.parameters() if p.requires_grad)
        if not all(hasattr(p, "main_grad") for p in learning):
            raise RuntimeError(
                "Runtime.gradient_accumulation_fusion=True needs Megatron-Core's DDP around the "
                "model, whose buffers it adds gradients into; wrap the model, or set it to False"
            )

    def _must_learn(self, embedded: torch.Tensor) -> bool:
        """Whether autograd must believe that a chunk's input learns, though nothing below it does.

        Megatron-Core's checkpoint computes gradients of weights only where its input has one. With
        adapters nothing of a whole stage may learn, but the schedule goes back through it.
        """
        recompute = self.runtime.recompute
        again = recompute.granularity != "none" or recompute.visual_chunk is not None
        if embedded.requires_grad or not torch.is_grad_enabled():
            return False
        if self.has_adapters or not again:
            return self.has_adapters
        return any(parameter.requires_grad for parameter in self.parameters())

    def angles(self, positions: torch.Tensor) -> torch.Tensor:
        """Rotary angles [n, 1, 1, kinds * head_dim] of positions [n], for each kind of layer.

        One tensor, since Megatron-Core passes only such on; each layer takes its slice.
        """
        return torch.cat([rotary_angles(positions, row) for row in self.inv_freq], dim=-1)

    def _embed(self, inputs: ModelInputs) -> torch.Tensor:
        """`[V; T]` of this sequence parallel shard."""
        text = self.embedding(inputs.text_ids[None], None)
        num_visual = inputs.params.num_visual
        if inputs.tiles is None and self.runtime.overlap_grad_reduce:
            text = text + self._rows_of_no_tile(text.dtype).sum()
        if num_visual == 0:
            return self._scale(text)
        visual = text.new_zeros(num_visual, 1, text.shape[-1])
        if inputs.tiles is not None and inputs.tile_share is not None:
            rows = self._rows_of_tiles(inputs, text.dtype)
            group = group_of_tiles(self.pg_collection, self.runtime.tower)
            visual = inputs.tile_share.exchange(rows, group)
            if self.tower_is_replicated:
                return self._scale(torch.cat([self._of_shard(visual), text]))
        elif inputs.tiles is not None:
            rows = self._visual_rows(inputs.tiles, text.dtype, inputs.items)
            visual = torch.cat([rows, visual[rows.shape[0] :]])
        if self.sequence_parallel:
            visual = tensor_parallel.scatter_to_sequence_parallel_region(
                visual, group=self.tp_group
            )
        return self._scale(torch.cat([visual, text]))

    def _of_shard(self, visual: torch.Tensor) -> torch.Tensor:
        """Visual rows of this shard from [V / tp, 1, hidden], which the exchange has brought.

        Without sequence parallelism each rank has all V rows and, in backward, their whole
        gradient: it keeps that of the rows which it put in.
        """
        if self.sequence_parallel:
            return visual
        return tensor_parallel.gather_from_sequence_parallel_region(
            visual, tensor_parallel_output_grad=False, group=self.tp_group
        )

    def _rows_of_tiles(self, inputs: ModelInputs, dtype: torch.dtype) -> torch.Tensor:
        """[tiles of this rank * patches, 1, hidden], tile after tile."""
        assert inputs.tiles is not None and inputs.tile_share is not None
        tiles = inputs.tile_share.tiles
        if tiles:
            return self._visual_rows(inputs.tiles, dtype, inputs.items, tiles)
        return self._rows_of_no_tile(dtype)

    def _visual_rows(
        self,
        tiles: torch.Tensor,
        dtype: torch.dtype,
        items: tuple[VisualShape, ...] = (),
        numbers: range | None = None,
    ) -> torch.Tensor:
        """[tiles * patches, 1, hidden] of uint8 tiles, the same on every tensor parallel rank."""
        runtime = self.runtime
        tower_learns = any(p.requires_grad for p in self.vision.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and tower_learns):
            pixels = normalize_pixels(tiles, runtime.image_mean, runtime.image_std, dtype)
            features = self.vision(pixels)
        return self.projector(features, items, numbers)[:, None]

    def _rows_of_no_tile(self, dtype: torch.dtype) -> torch.Tensor:
        """[0, 1, hidden], which need a gradient where rows of tiles would.

        Every rank of an exchange must take part in its backward pass, if any of them learns. DDP's
        overlap moreover reduces a bucket when each of its parameters has a gradient, and these must
        come in one order on all ranks: so a black tile is encoded, and its gradient is zero.
        """
        parameters = itertools.chain(self.vision.parameters(), self.projector.parameters())
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        device = self.inv_freq.device
        if learns and self.runtime.overlap_grad_reduce:
            size = self.vision.vision.image_size
            tile = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)
            return self._visual_rows(tile, dtype)[:0]
        rows = torch.zeros(0, 1, self.config.hidden_size, dtype=dtype, device=device)
        return rows.requires_grad_(learns)

    def _scale(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self.scale_embeddings:
            return hidden
        # Hugging Face rounds the factor to the dtype first: 59.75 in bf16 for hidden size 3584.
        return hidden * torch.tensor(self.config.hidden_size**0.5, dtype=hidden.dtype).item()

    def _text_rows(self, hidden: torch.Tensor, params: DecomposedSeqParams) -> torch.Tensor:
        """[T, 1, hidden] on every tensor parallel rank; text rows stand last on every shard."""
        shards = self.tp_group.size() if self.sequence_parallel else 1
        text = hidden[hidden.shape[0] - params.num_text // shards :]
        if not self.sequence_parallel:
            return text
        return tensor_parallel.gather_from_sequence_parallel_region(
            text, tensor_parallel_output_grad=False, group=self.tp_group
        )

    def _output_weight(self) -> torch.Tensor:
        """[padded vocabulary / tp, hidden]."""
        if self.pre_process and self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 logits [rows, 1, padded vocabulary / tp]; padded entries are minus infinity."""
        logits, _ = self.output_layer(rows, weight=self._output_weight())
        first = get_pg_rank(self.tp_group) * logits.shape[-1]
        return cap_and_mask(logits.float(), self.final_softcap, self.vocab_size - first)

    def _losses(self, text: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows = (labels != IGNORED_LABEL).nonzero()[:, 0]
        if self.runtime.overlap_param_gather:
            with torch.no_grad():
                self._logits(text[:0])  # DDP gathers a module's weights when it is called
        if rows.numel() == 0:
            nothing = text[:1].float().sum()
            if self.runtime.overlap_grad_reduce:
                nothing = nothing + self._output_weight()[0, 0].float()
            return nothing * torch.zeros(1, device=text.device)
        return chunked_cross_entropy(
            text[rows, 0],
            self._output_weight(),
            labels[rows],
            chunk=self.runtime.loss_chunk,
            softcap=self.final_softcap,
            vocab_size=self.vocab_size,
            tp_group=self.tp_group,
        )


def freeze_all_but(model: DattnModel, trains: Collection[Part]) -> None:
    """Leaves gradients to the named parts only: vision, projector, llm.

    Of a part with adapters these alone learn.
    """
    adapters = adapter_names(model)
    for name, parameter in model.named_parameters():
        learns = part_of(name) in trains
        if model.has_adapters and part_of(name) == "llm":
            learns = learns and name in adapters
        parameter.requires_grad_(learns)
