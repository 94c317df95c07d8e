"""A whole run: set up, go on from where it stood, step, report, save."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_rank

from dattn_mcore.checkpoint.load import (
    check_same_run,
    choose_checkpoint,
    load_weights,
    resume,
)
from dattn_mcore.checkpoint.save import CheckpointSaver
from dattn_mcore.config.load import to_yaml
from dattn_mcore.config.schema import Config
from dattn_mcore.data.batch import MicroBatch
from dattn_mcore.data.pipeline import DataPipeline, mask
from dattn_mcore.data.tokenizer import load_tokenizer
from dattn_mcore.errors import ConfigError, DattnError
from dattn_mcore.layers.implementation import TRANSFORMER_ENGINE, choose_implementation
from dattn_mcore.models.build import build_model
from dattn_mcore.models.dattn import IGNORED_LABEL
from dattn_mcore.parallel import platform
from dattn_mcore.plan.flops import rows_of, step_work
from dattn_mcore.training.agreement import agree
from dattn_mcore.training.communication import with_communication_share
from dattn_mcore.training.inputs import all_model_inputs, fixed_rows, needs_pixels
from dattn_mcore.training.ledger import SampleLedger
from dattn_mcore.training.not_finite import NotFiniteError, explain
from dattn_mcore.training.optimizer import (
    build_optimizer,
    build_scheduler,
    gathered_weights,
    wrap_ddp,
)
from dattn_mcore.training.report import Reporter
from dattn_mcore.training.signals import StopRequest
from dattn_mcore.training.start_checks import check_checkpoint_folder
from dattn_mcore.training.step import train_step
from dattn_mcore.training.watchdog import Watchdog

logger = logging.getLogger(__name__)
FINISHED = "finished.json"  # in the run folder after the last step: for whoever starts runs again


def total_steps(config: Config, data: DataPipeline) -> int:
    """Optimizer steps of the run: `train.steps`, or as many as `train.epochs` takes."""
    if config.train.steps is not None:
        return config.train.steps
    return max(1, data.steps.up_to(math.ceil(data.num_samples * config.train.epochs)))


def open_data(
    config: Config, pg_collection: ProcessGroupCollection, device: torch.device
) -> DataPipeline:
    """This rank's data pipeline."""
    return DataPipeline(
        config,
        load_tokenizer(config.data.tokenizer),
        dp_rank=get_pg_rank(pg_collection.dp),
        dp_size=pg_collection.dp.size(),
        microbatch_multiple=config.parallel.pp if config.parallel.vpp > 1 else 1,
        needs_pixels=needs_pixels(pg_collection),
        image_device="cpu" if device.type == "cpu" else "gpu",
        image_device_id=device.index,
    )


def train(
    config: Config,
    pg_collection: ProcessGroupCollection,
    device: torch.device,
    watchdog: Watchdog | None = None,
) -> bool:
    """Trains until the last step or a stopping signal; called by all ranks.

    Args:
        config: a checked configuration.
        pg_collection: process groups of its layout.
        device: of this process.
        watchdog: that this process has already; without one it gets one for this call.

    Returns:
        True if the run is complete, False if a signal stopped it.

    Raises:
        DattnError: a user's mistake, the same on every rank.
    """
    if watchdog is not None:
        return _train(config, pg_collection, device, watchdog)
    watchdog = Watchdog(dist.get_rank(), dist.get_world_size())
    try:
        return _train(config, pg_collection, device, watchdog)
    finally:
        watchdog.close()


def _train(
    config: Config,
    pg_collection: ProcessGroupCollection,
    device: torch.device,
    watchdog: Watchdog,
) -> bool:
    run_dir, health = Path(config.log.run_dir), config.health
    speaks = dist.get_rank() == 0
    check_checkpoint_folder(run_dir, device)
    data, problem = None, None
    # The first rank makes the index where it is absent; the others find it, or, on a machine that
    # shares no disk with the first, their first one makes it there.
    for opens in (speaks, not speaks):
        try:
            if opens:
                data = open_data(config, pg_collection, device)
            if opens and speaks:
                (run_dir / FINISHED).unlink(missing_ok=True)
        except DattnError as error:
            problem = error
        agree(problem, False, device)
    assert data is not None

    watchdog.phase(
        "loading", health.checkpoint_timeout_seconds, "health.checkpoint_timeout_seconds"
    )
    found = choose_checkpoint(run_dir / "checkpoints") if config.checkpoint.resume else None
    if found is not None:
        folder, manifest = found
        check_same_run(config, manifest, folder, data.fingerprint)
    fresh = config.checkpoint.init_from is None and found is None
    if config.parallel.tp_comm_overlap:
        _start_overlap(config, device)
    chunks = build_model(config, pg_collection, device, initialize=fresh)
    if config.checkpoint.init_from is not None and found is None:
        source = load_weights(Path(config.checkpoint.init_from), config, chunks, pg_collection)
        logger.info("weights from %s", source)
    model = wrap_ddp(chunks, config, pg_collection)
    optimizer = build_optimizer(config, model)
    last = total_steps(config, data)
    scheduler = build_scheduler(config, optimizer, last)
    first = 0
    if found is not None:
        first = resume(folder, manifest, chunks, optimizer, pg_collection)
        scheduler.step(first)
        logger.info("resumed at step %d of %d", first, last)
    reporter = ledger = None
    if speaks:
        (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        reporter = Reporter(config, run_dir, first, last)
        ledger = SampleLedger(run_dir, data.index, config.data.max_bad_share, first)
    saver = CheckpointSaver(
        *(run_dir / "checkpoints", config, chunks, optimizer, pg_collection, data.fingerprint)
    )
    stop = StopRequest()
    step = saved = first
    interval = config.log.interval

    def save(step: int) -> None:
        watchdog.phase(
            f"saving after step {step}",
            *(health.checkpoint_timeout_seconds, "health.checkpoint_timeout_seconds"),
        )
        with gathered_weights(model, config):
            say_saved(saver.save(step))
        if reporter is not None:
            reporter.restart_clock(step)

    def say_saved(folder: Path | None) -> None:
        if folder is not None:
            logger.info("saved %s", folder)

    problem = None
    try:
        while step < last:
            watchdog.phase(
                f"waiting for data of step {step + 1}",
                *(health.step_timeout_seconds, "health.step_timeout_seconds"),
            )
            batch, asked = None, time.perf_counter()
            try:
                batch = data.global_batch(step)
            except DattnError as error:
                problem = problem or error
            waited = time.perf_counter() - asked
            watchdog.phase(
                f"step {step + 1}", health.step_timeout_seconds, "health.step_timeout_seconds"
            )
            agreed = agree(
                problem,
                stop.received is not None,
                device,
                failures=batch.failures if batch is not None else (),
                data_wait=waited,
                peak_memory=platform.peak_memory(),
            )
            if agreed.stop:
                break
            assert batch is not None
            failed = {failure.sample for failure in agreed.failures}
            micro_batches = [mask(item, failed) for item in batch.microbatches]
            inputs = all_model_inputs(micro_batches, config, pg_collection, device)
            flops = _model_flops(config, micro_batches)
            one_step = functools.partial(
                train_step, model, optimizer, scheduler, inputs, pg_collection, flops
            )
            share = None
            try:
                if speaks and config.log.communication_share and (step + 1) % interval == 0:
                    result, share = with_communication_share(one_step)
                else:
                    result = one_step()
            except NotFiniteError as error:
                raise explain(error, step + 1, batch) from None
            step += 1
            say_saved(saver.poll())
            if reporter is not None and ledger is not None:
                rate = get_canonical_lr_for_logging(optimizer.param_groups) or 0.0
                reporter.step(step, result, rate, batch, agreed, share)
                problem = ledger.step(step, batch, agreed.failures)
            if step % config.checkpoint.save_interval == 0 and step < last:
                save(step)
                saved = step
        if step > saved:
            save(step)
        say_saved(saver.poll(blocking=True))
    except DattnError:  # the same on every rank: a save that is under way is finished
        say_saved(saver.poll(blocking=True))
        raise
    finally:
        saver.close()
        stop.restore()
        data.close()
    if reporter is not None and ledger is not None:
        reporter.close(step)
        ledger.close(data.steps, data.num_samples)
        if step == last:
            (run_dir / FINISHED).write_text(json.dumps({"step": step}), encoding="utf-8")
    if step < last:
        logger.info("stopped by a signal at step %d of %d; start again to go on", step, last)
    return step == last


def _start_overlap(config: Config, device: torch.device) -> None:
    if choose_implementation(config) != TRANSFORMER_ENGINE:
        raise ConfigError(
            "parallel.tp_comm_overlap=true needs Transformer Engine, and this run takes the local "
            "linears; set it off"
        )
    from dattn_mcore.layers.spec_te import start_overlap

    start_overlap(
        sum(fixed_rows(config)),
        config.model.llm.hidden_size,
        config.parallel.tp,
        config.train.fp8 != "none",
        platform.backend("cpu" if device.type == "cpu" else "gpu"),
    )


def _model_flops(config: Config, micro_batches: list[MicroBatch]) -> float:
    """Operations of this replica's packs, by their real rows."""
    total = 0.0
    for pack in micro_batches:
        labelled = int((pack.labels != IGNORED_LABEL).sum())
        rows = rows_of(config, pack.layouts, labelled)
        rows = dataclasses.replace(rows, packs=1.0)
        total += sum(work.total for work in step_work(config, rows).values())
    return total
