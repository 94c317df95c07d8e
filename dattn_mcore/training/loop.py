"""A whole run: set up, go on from where it stood, step, report, save."""

from __future__ import annotations

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
from dattn_mcore.checkpoint.save import save_checkpoint
from dattn_mcore.config.load import to_yaml
from dattn_mcore.config.schema import Config
from dattn_mcore.data.pipeline import DataPipeline, mask
from dattn_mcore.data.tokenizer import load_tokenizer
from dattn_mcore.errors import DattnError
from dattn_mcore.models.build import build_model
from dattn_mcore.training.agreement import agree
from dattn_mcore.training.inputs import all_model_inputs, needs_pixels
from dattn_mcore.training.ledger import SampleLedger
from dattn_mcore.training.optimizer import build_optimizer, build_scheduler, wrap_ddp
from dattn_mcore.training.report import Reporter
from dattn_mcore.training.signals import StopRequest
from dattn_mcore.training.step import train_step

logger = logging.getLogger(__name__)


def total_steps(config: Config, num_samples: int) -> int:
    """Optimizer steps of the run: `train.steps`, or as many as `train.epochs` takes."""
    if config.train.steps is not None:
        return config.train.steps
    return max(1, math.ceil(num_samples * config.train.epochs / config.train.global_batch_size))


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


def train(config: Config, pg_collection: ProcessGroupCollection, device: torch.device) -> bool:
    """Trains until the last step or a stopping signal; called by all ranks.

    Args:
        config: a checked configuration.
        pg_collection: process groups of its layout.
        device: of this process.

    Returns:
        True if the run is complete, False if a signal stopped it.

    Raises:
        DattnError: a user's mistake, the same on every rank.
    """
    run_dir = Path(config.log.run_dir)
    speaks = dist.get_rank() == 0
    data, problem = None, None
    # The first rank makes the index where it is absent; the others find it, or, on a machine that
    # shares no disk with the first, their first one makes it there.
    for opens in (speaks, not speaks):
        try:
            if opens:
                data = open_data(config, pg_collection, device)
            if opens and speaks:
                run_dir.mkdir(parents=True, exist_ok=True)
        except DattnError as error:
            problem = error
        except OSError as error:
            problem = DattnError(f"log.run_dir={run_dir} cannot be made ({error.strerror})")
        agree(problem, False, device)
    assert data is not None

    found = choose_checkpoint(run_dir / "checkpoints") if config.checkpoint.resume else None
    if found is not None:
        folder, manifest = found
        check_same_run(config, manifest, folder, data.fingerprint)
    fresh = config.checkpoint.init_from is None and found is None
    chunks = build_model(config, pg_collection, device, initialize=fresh)
    if config.checkpoint.init_from is not None and found is None:
        source = load_weights(Path(config.checkpoint.init_from), config, chunks, pg_collection)
        logger.info("weights from %s", source)
    model = wrap_ddp(chunks, config, pg_collection)
    optimizer = build_optimizer(config, model)
    last = total_steps(config, data.num_samples)
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
    stop = StopRequest()
    step, problem = first, None
    try:
        while step < last:
            batch = None
            started = time.perf_counter()
            try:
                batch = data.global_batch(step)
            except DattnError as error:
                problem = problem or error
            waited = time.perf_counter() - started
            failures = batch.failures if batch is not None else ()
            agreed = agree(problem, stop.received is not None, device, failures)
            if agreed.stop:
                break
            assert batch is not None
            failed = {failure.sample for failure in agreed.failures}
            micro_batches = [mask(item, failed) for item in batch.microbatches]
            inputs = all_model_inputs(micro_batches, config, pg_collection, device)
            result = train_step(model, optimizer, scheduler, inputs, pg_collection)
            step += 1
            if reporter is not None and ledger is not None:
                reporter.step(
                    step,
                    result,
                    get_canonical_lr_for_logging(optimizer.param_groups) or 0.0,
                    batch,
                    agreed.failures,
                    waited,
                )
                problem = ledger.step(step, batch, agreed.failures)
            if step % config.checkpoint.save_interval == 0 and step < last:
                _save(config, step, chunks, optimizer, pg_collection, data, reporter)
        if step > first:
            _save(config, step, chunks, optimizer, pg_collection, data, reporter)
    finally:
        stop.restore()
        data.close()
    if reporter is not None and ledger is not None:
        reporter.close(step)
        ledger.close(config.train.global_batch_size, data.num_samples)
    if step < last:
        logger.info("stopped by a signal at step %d of %d; start again to go on", step, last)
    return step == last


def _save(config, step, chunks, optimizer, pg_collection, data, reporter):  # type: ignore[no-untyped-def]
    folder = save_checkpoint(
        Path(config.log.run_dir) / "checkpoints",
        step,
        config,
        chunks,
        optimizer,
        pg_collection,
        data.fingerprint,
    )
    logger.info("saved %s", folder)
    if reporter is not None:
        reporter.restart_clock(step)
