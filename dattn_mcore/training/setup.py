"""From a configuration to everything that a run steps with, on this rank."""

from __future__ import annotations

import logging
import math
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_rank

from dattn_mcore.checkpoint.adapters import check_base, describe_base
from dattn_mcore.checkpoint.load import (
    choose_checkpoint,
    load_weights,
    resume,
)
from dattn_mcore.checkpoint.same_run import check_same_run
from dattn_mcore.checkpoint.save import CheckpointSaver
from dattn_mcore.config.load import from_dict
from dattn_mcore.config.lora import adapters_of
from dattn_mcore.config.schema import Config
from dattn_mcore.config.scores_rules import asks
from dattn_mcore.config.validation_rules import validates
from dattn_mcore.data.index.identity import difference
from dattn_mcore.data.pipeline import DataPipeline
from dattn_mcore.data.tokenizer import load_tokenizer
from dattn_mcore.data.validation import ValidationData
from dattn_mcore.errors import DataError, DattnError
from dattn_mcore.layers.runtime import Runtime
from dattn_mcore.models.dattn import DattnModel
from dattn_mcore.parallel import groups
from dattn_mcore.training.agreement import agree
from dattn_mcore.training.ema import start_ema
from dattn_mcore.training.hooks import Hooks
from dattn_mcore.training.hooks_of_run import FINISHED, build_hooks
from dattn_mcore.training.inputs import needs_pixels
from dattn_mcore.training.last_words import unexpected
from dattn_mcore.training.model import build_from_config, start_adapters, start_overlap
from dattn_mcore.training.optimizer import build_optimizer, wrap_ddp
from dattn_mcore.training.resumed_settings import take_settings
from dattn_mcore.training.schedule import build_scheduler
from dattn_mcore.training.scores_check import check_scores
from dattn_mcore.training.sinks.build import check_trackers
from dattn_mcore.training.start_checks import check_checkpoint_folder
from dattn_mcore.training.watchdog import Watchdog

logger = logging.getLogger(__name__)
Found = tuple[Path, dict[str, Any]]  # a checkpoint's folder and its manifest


@dataclass(frozen=True)
class Run:
    """A run that is ready for its next step.

    Attributes:
        config: a checked configuration.
        pg_collection: process groups of its layout.
        device: of this process.
        watchdog: of this process.
        data: this rank's data pipeline.
        model: this stage's chunks.
        optimizer: of these.
        scheduler: stands at `first_step`.
        saver: writes checkpoints into the run's folder.
        first_step: steps that are done already.
        last_step: steps after which the run is complete.
        hooks: what happens around its steps.
    """

    config: Config
    pg_collection: ProcessGroupCollection
    device: torch.device
    watchdog: Watchdog
    data: DataPipeline
    model: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    saver: CheckpointSaver
    first_step: int
    last_step: int
    hooks: Hooks


def set_up(
    config: Config,
    runtime: Runtime,
    pg_collection: ProcessGroupCollection,
    device: torch.device,
    watchdog: Watchdog,
) -> Run:
    """Opens the data, builds the model, and loads what the run goes on from; called by all ranks.

    Args:
        config: a checked configuration.
        runtime: how its model is computed.
        pg_collection: process groups of its layout.
        device: of this process.
        watchdog: of this process.

    Raises:
        DattnError: a user's mistake, the same on every rank.
    """
    run_dir, health = Path(config.log.run_dir), config.health
    check_checkpoint_folder(run_dir, device)
    data, held_out = _open_data_in_turn(config, pg_collection, device)
    watchdog.phase(
        "loading", health.checkpoint_timeout_seconds, "health.checkpoint_timeout_seconds"
    )
    found = choose_checkpoint(run_dir / "checkpoints") if config.checkpoint.resume else None
    schedule = last = total_steps(config, data)
    if found is not None:
        check_same_run(config, found[1], found[0], data.identity)
        config, schedule = take_settings(config, found[1], last, _schedule_of(found[1], data))
    chunks, base = _build(config, runtime, pg_collection, device, found)
    model = wrap_ddp(chunks, config, pg_collection)
    optimizer = build_optimizer(config, model)
    scheduler = build_scheduler(config, optimizer, schedule)
    first = 0
    if found is not None:
        first = resume(*found, chunks, optimizer, pg_collection)
        scheduler.step(first)
        logger.info("resumed at step %d of %d", first, last)
    ema = start_ema(config, model, pg_collection, found)
    hooks = build_hooks(
        config,
        data,
        held_out,
        model,
        optimizer,
        pg_collection,
        ema=ema,
        device=device,
        watchdog=watchdog,
        first_step=first,
        last_step=last,
    )
    if found is not None:
        hooks.restore(found[1].get("hooks", {}))
    saver = CheckpointSaver(
        root=run_dir / "checkpoints",
        config=config,
        chunks=chunks,
        optimizer=optimizer,
        pg_collection=pg_collection,
        data_identity=data.identity,
        tokenizer_fingerprint=data.tokenizer_fingerprint,
        schedule_steps=schedule,
        base=base,
        in_use=hooks.in_use,
    )
    if ema is not None:
        saver.beside = ema.sharded
    return Run(
        config=config,
        pg_collection=pg_collection,
        device=device,
        watchdog=watchdog,
        data=data,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        saver=saver,
        first_step=first,
        last_step=last,
        hooks=hooks,
    )


def total_steps(config: Config, data: DataPipeline) -> int:
    """Optimizer steps of the run: `train.steps`, or as many as `train.epochs` takes."""
    if config.train.steps is not None:
        return config.train.steps
    return max(1, data.steps.up_to(math.ceil(data.num_samples * config.train.epochs)))


def _schedule_of(manifest: dict[str, Any], data: DataPipeline) -> int:
    """Steps of the learning rate's schedule in a checkpoint of this run."""
    if manifest.get("schedule_steps") is not None:
        return int(manifest["schedule_steps"])
    return total_steps(from_dict({"train": manifest["config"]["train"]}), data)


def _open_data_in_turn(
    config: Config, pg_collection: ProcessGroupCollection, device: torch.device
) -> tuple[DataPipeline, ValidationData | None]:
    """Every rank's data, held-out data too; the run counts as unfinished from here on.

    The first rank sees first that what is reported to, and asked while training, is there.

    The first rank makes the index where it is absent; the others find it, or, on a machine that
    shares no disk with the first, their first one makes it there.
    """
    opened: tuple[DataPipeline, ValidationData | None] | None = None
    problem: DattnError | None = None
    speaks = dist.get_rank() == 0
    for turn, opens in enumerate((speaks, not speaks)):
        try:
            if opens and speaks:  # before hours of reading
                check_trackers(config)
                if asks(config):
                    check_scores(config)
            if opens:
                opened = _open_data(config, pg_collection, device)
            if opens and speaks:
                (Path(config.log.run_dir) / FINISHED).unlink(missing_ok=True)
        except DattnError as error:
            problem = error
        except Exception as error:  # noqa: BLE001 (the other ranks must know)
            problem = unexpected(error, "opening the data", Path(config.log.run_dir))
        groups.wait_for_all(f"data/{turn}")  # an index of millions of samples takes long
        agree(problem, device)
    assert opened is not None
    _check_same_data(opened[0])
    return opened


def _check_same_data(data: DataPipeline) -> None:
    """Ranks that see other files would take other samples for the same step.

    Raises:
        DataError: on every rank; names the first rank that differs, and in what.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), data.identity))
    first_host, first = everyone[0]
    for rank, (host, identity) in enumerate(everyone):
        if other := difference(identity, first):
            raise DataError(
                f"rank {rank} on {host} has other data than rank 0 on {first_host} has here: "
                f"{other}; give all nodes the same files (data.annotations, data.image_folder)"
            )


def _open_data(
    config: Config, pg_collection: ProcessGroupCollection, device: torch.device
) -> tuple[DataPipeline, ValidationData | None]:
    tokenizer = load_tokenizer(config.data.tokenizer)
    data = DataPipeline(
        config,
        tokenizer,
        dp_rank=get_pg_rank(pg_collection.dp),
        dp_size=pg_collection.dp.size(),
        microbatch_multiple=config.parallel.pp if config.parallel.vpp > 1 else 1,
        needs_pixels=needs_pixels(pg_collection),
        image_device="cpu" if device.type == "cpu" else "gpu",
        image_device_id=device.index,
        tile_rank=get_pg_rank(pg_collection.cp),
        tile_ranks=pg_collection.cp.size(),
    )
    return data, ValidationData(config, tokenizer, data) if validates(config) else None


def _build(
    config: Config,
    runtime: Runtime,
    pg_collection: ProcessGroupCollection,
    device: torch.device,
    found: Found | None,
) -> tuple[list[DattnModel], dict[str, str] | None]:
    """This stage's chunks: at random, or from another run's weights; `resume` comes later.

    With adapters the other weights are another run's, on a resume too.

    Returns:
        The chunks, and with adapters what a checkpoint says of the base.
    """
    source = config.checkpoint.init_from
    if runtime.tp_comm_overlap:
        start_overlap(config, runtime, device)
    fresh = source is None and found is None
    chunks = build_from_config(config, pg_collection, device, initialize=fresh, runtime=runtime)
    adapters, base = adapters_of(config), None
    if source is not None and (found is None or adapters is not None):
        loaded = load_weights(Path(source), config, chunks, pg_collection)
        logger.info("weights from %s", loaded)
        if adapters is not None:
            base = describe_base(loaded)
            if found is not None:
                check_base(found[1], found[0], loaded, "checkpoint.init_from")
            else:
                start_adapters(config, adapters, chunks)
    return chunks, base
