"""A run's model: the records that it is built from, out of the configuration."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.process_groups_config import ProcessGroupCollection

from dattn_mcore.architectures.adapters import Adapters, summed_weight
from dattn_mcore.architectures.parameters import Entry, part_of
from dattn_mcore.architectures.patterns import key_and_layer
from dattn_mcore.architectures.sizes import ModelConfig
from dattn_mcore.checkpoint.base_sums import Sums, check_same_base, sums_of
from dattn_mcore.checkpoint.peft_folder import read_peft_folder
from dattn_mcore.config.lora import adapters_of
from dattn_mcore.config.optim_groups import learns
from dattn_mcore.config.schema import Config
from dattn_mcore.errors import CheckpointError
from dattn_mcore.layers.runtime import Runtime
from dattn_mcore.models.build import build_model
from dattn_mcore.models.dattn import DattnModel
from dattn_mcore.models.initialize import fill, initialize_adapters
from dattn_mcore.parallel import platform
from dattn_mcore.training.inputs import fixed_rows
from dattn_mcore.training.runtime import decide_runtime

logger = logging.getLogger(__name__)


def build_from_config(
    config: Config,
    pg_collection: ProcessGroupCollection,
    device: torch.device,
    initialize: bool = True,
    runtime: Runtime | None = None,
) -> list[DattnModel]:
    """Builds the model chunks of this pipeline stage (one, or vpp of them).

    Args:
        config: the run's configuration.
        pg_collection: process groups of its layout.
        device: where parameters end up.
        initialize: fill fresh weights; without it they hold garbage until a checkpoint is loaded.
        runtime: what was decided at the start of the run; None: it is decided here, for a model
            that no DDP is put around.

    Returns:
        The chunks in the order of the interleaved schedule, frozen parameters marked.
    """
    if runtime is None:
        runtime = replace(decide_runtime(config), gradient_accumulation_fusion=False)
    chunks = build_model(
        config.model,
        config.attention,
        runtime,
        pg_collection,
        device=device,
        seed=config.train.seed if initialize else None,
        adapters=adapters_of(config),
    )
    for chunk in chunks:
        freeze(config, chunk)
    return chunks


def start_adapters(config: Config, adapters: Adapters, chunks: list[DattnModel]) -> None:
    """Gives adapters their first values, beside weights that are there: new, or `lora.init_from`.

    Called by all ranks.

    Raises:
        CheckpointError: the folder is broken, or of another model or other adapters; or a part of
            the model that it holds as a whole does not learn here.
    """
    initialize_adapters(chunks, config.model, config.train.seed, adapters)
    if config.lora.init_from is None:
        return
    folder = read_peft_folder(Path(config.lora.init_from), config.model, adapters)
    where = f"lora.init_from={config.lora.init_from}"
    if folder.base_sums is None:
        logger.info("%s does not say which base it is of; its shapes fit", where)
    else:
        check_same_base(where, folder.base_sums, _sums_of_base(chunks, config.model))
    _check_whole_parts_learn(config, where, folder.table)
    fill(chunks, folder.table, folder.value, others=True)


def _sums_of_base(chunks: list[DattnModel], model: ModelConfig) -> Sums:
    """See `base_sums`, of a model that is divided over all ranks; called by all of them."""
    key = summed_weight(model).key
    device = next(chunks[0].parameters()).device
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for chunk in chunks:
        for shard in chunk.sharded_state_dict().values():
            if not isinstance(shard, ShardedTensor) or shard.key != key:
                continue
            if shard.global_offset[0] == 0 and is_main_replica(shard.replica_id):
                total += sums_of(shard.data)
    dist.all_reduce(total)
    first, second = total.tolist()
    return first, second


def _check_whole_parts_learn(config: Config, where: str, table: Iterable[Entry]) -> None:
    """A checkpoint of adapters holds what learns; the rest would be the base's when it is read."""
    for entry in table:
        assert entry.key is not None
        part = part_of(entry.key)
        if part != "llm" and not all(learns(config, entry.key, n) for n in entry.all_numbers()):
            raise CheckpointError(
                f"{where} holds a {part} of its own, and {entry.key} does not learn here; let it "
                f"learn (train.trains=[{part},llm]), or start from a folder of adapters alone"
            )


def freeze(config: Config, chunk: DattnModel) -> None:
    """Only parameters that learn get gradients and optimizer states."""
    first = first_layer(chunk)
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(learns(config, *key_and_layer(name, first)))


def first_layer(chunk: DattnModel) -> int:
    """Number in the whole model, from 0, of the first of the decoder's layers in a chunk."""
    layers = chunk.decoder.layers
    return int(layers[0].layer_number) - 1 if len(layers) else 0


def start_overlap(config: Config, runtime: Runtime, device: torch.device) -> None:
    """Registers what `parallel.tp_comm_overlap` needs; once, before the first step.

    Args:
        config: the run's configuration; with `data.fixed_rows`, since buffers have one size.
        runtime: how its model is computed, by Transformer Engine.
        device: of this process.

    Raises:
        ConfigError: this Transformer Engine is too old.
    """
    from dattn_mcore.layers import spec_te  # needs Transformer Engine

    fp8 = runtime.fp8
    spec_te.start_overlap(
        rows=sum(fixed_rows(config)) // config.parallel.cp,
        hidden_size=config.model.llm.hidden_size,
        tp_size=config.parallel.tp,
        fp8=fp8 is not None,
        bf16=fp8 is None or fp8.bf16_layers > 0,
        backend=platform.backend("cpu" if device.type == "cpu" else "gpu"),
    )
