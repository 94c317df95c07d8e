"""A run's model: the records that it is built from, out of the configuration."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from dattn_mcore.architectures.adapters import Adapters, adapter_table
from dattn_mcore.architectures.patterns import key_and_layer
from dattn_mcore.checkpoint.peft_folder import read_peft_folder
from dattn_mcore.config.lora import adapters_of
from dattn_mcore.config.optim_groups import learns
from dattn_mcore.config.schema import Config
from dattn_mcore.layers.runtime import Runtime
from dattn_mcore.models.build import build_model
from dattn_mcore.models.dattn import DattnModel
from dattn_mcore.models.initialize import fill, initialize_adapters
from dattn_mcore.parallel import platform
from dattn_mcore.training.inputs import fixed_rows
from dattn_mcore.training.runtime import decide_runtime


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
        runtime: what was decided at the start of the run; None: it is decided here.

    Returns:
        The chunks in the order of the interleaved schedule, frozen parameters marked.
    """
    chunks = build_model(
        config.model,
        config.attention,
        decide_runtime(config) if runtime is None else runtime,
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

    Raises:
        CheckpointError: the folder is broken, or of another model or other adapters.
    """
    initialize_adapters(chunks, config.model, config.train.seed, adapters)
    if config.lora.init_from is not None:
        folder = read_peft_folder(Path(config.lora.init_from), config.model, adapters)
        fill(chunks, adapter_table(config.model, adapters), folder.value, others=True)


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
        rows=sum(fixed_rows(config)),
        hidden_size=config.model.llm.hidden_size,
        tp_size=config.parallel.tp,
        fp8=fp8 is not None,
        bf16=fp8 is None or fp8.bf16_layers > 0,
        backend=platform.backend("cpu" if device.type == "cpu" else "gpu"),
    )
