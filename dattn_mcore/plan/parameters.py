"""Every parameter that one rank of a pipeline stage holds, in Megatron-Core's order.

The order matters: Megatron-Core lays gradients and optimizer states out in it. Tests hold names,
shapes, dtypes and order equal to those of the model that Megatron-Core builds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dattn_mcore.architectures.adapters import with_adapters
from dattn_mcore.architectures.decoder import EMBEDDING, OUTPUT, output_layer
from dattn_mcore.architectures.parameters import Entry, in_order_of_modules, part_of
from dattn_mcore.architectures.projector import projector_table
from dattn_mcore.architectures.tables import language_table, tower_table
from dattn_mcore.config.lora import adapters_of
from dattn_mcore.config.optim_groups import Table, resolved, tensor_of
from dattn_mcore.config.schema import Config

BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Parameter:
    """A parameter of one rank.

    Attributes:
        name: as Megatron-Core's module has it.
        shape: on one tensor parallel rank.
        dtype: bf16 or fp32.
        trained: whether it has a gradient.
        shared_embedding: tied weight of which two stages hold a copy.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    trained: bool
    shared_embedding: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def part(self) -> str:
        """vision, projector or llm."""
        return part_of(self.name)


def layers_of_stage(config: Config, stage: int) -> list[list[int]]:
    """Numbers (from 0) of the language model's layers in each model chunk of a stage."""
    parallel, layers = config.parallel, config.model.llm.num_layers
    first = parallel.first_stage_layers
    if first is not None:
        rest = (layers - first) // (parallel.pp - 1)
        start = 0 if stage == 0 else first + (stage - 1) * rest
        return [list(range(start, start + (first if stage == 0 else rest)))]
    chunk = layers // (parallel.pp * parallel.vpp)
    starts = [(index * parallel.pp + stage) * chunk for index in range(parallel.vpp)]
    return [list(range(start, start + chunk)) for start in starts]


def stage_parameters(config: Config, stage: int) -> list[list[Parameter]]:
    """Parameters of one rank of a stage, one list per model chunk.

    Args:
        config: a checked configuration.
        stage: pipeline stage, from 0.
    """
    parallel, table = config.parallel, resolved(config)
    chunks = []
    for index, layers in enumerate(layers_of_stage(config, stage)):
        first = stage == 0 and index == 0
        last = stage == parallel.pp - 1 and index == parallel.vpp - 1
        chunks.append(list(_chunk(config, table, layers, first, last)))
    return chunks


def _chunk(
    config: Config, table: Table, layers: list[int], first: bool, last: bool
) -> Iterator[Parameter]:
    """Parameters of a model chunk with some of the decoder's layers, numbered in the model."""
    model = config.model
    apart = model.llm.tie_embeddings and config.parallel.pp > 1
    language, adapters = language_table(model), adapters_of(config)
    if adapters is not None:
        language = with_adapters(language, model, adapters)
    if apart:
        language.append(output_layer(model.llm))
    if first:
        for entry, layer in in_order_of_modules([*tower_table(model), *projector_table(model)]):
            yield _parameter(config, table, entry, layer, number=layer)
    for entry, layer in in_order_of_modules(language, layers):
        embeds = entry.key == EMBEDDING
        if entry.layers is not None or (first if embeds else last):
            copied = apart and (embeds or entry.key == OUTPUT)
            number = None if layer is None else layers[layer]
            yield _parameter(config, table, entry, layer, number=number, shared=copied)


def _ranks_of(config: Config, key: str) -> int:
    """Tensor parallel ranks that divide a parameter."""
    whole = part_of(key) != "llm" and config.parallel.tower == "tiles"
    return 1 if whole else config.parallel.tp


def _parameter(
    config: Config,
    table: Table,
    entry: Entry,
    layer: int | None,
    *,
    number: int | None,
    shared: bool = False,
) -> Parameter:
    """A parameter of a layer, which has a number here and one in the whole model."""
    assert entry.key is not None
    dtype = "bf16" if config.train.precision == "bf16" else "fp32"
    return Parameter(
        name=entry.key.replace(".layers.", f".layers.{layer}."),
        shape=entry.shard_shape(_ranks_of(config, entry.key)),
        dtype="fp32" if entry.dtype == "float32" else dtype,
        trained=table[tensor_of(config.model, entry.key, number)].trains,
        shared_embedding=shared,
    )
