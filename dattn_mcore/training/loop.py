"""A whole run: set up, step, report, save."""

from __future__ import annotations

import functools
import logging
import time
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from dattn_mcore.config.schema import Config
from dattn_mcore.data.batch import GlobalBatch, MicroBatch
from dattn_mcore.data.failures import mask
from dattn_mcore.errors import CheckpointError, DattnError, RankError
from dattn_mcore.layers.runtime import Runtime
from dattn_mcore.parallel import platform
from dattn_mcore.plan.flops import step_work
from dattn_mcore.plan.rows import rows_of
from dattn_mcore.training.agreement import Agreement, agree
from dattn_mcore.training.communication import with_communication_share
from dattn_mcore.training.hooks import StepDone
from dattn_mcore.training.inputs import all_model_inputs
from dattn_mcore.training.last_words import speaking, this_rank, unexpected
from dattn_mcore.training.memory import StepMemoryError, explain_memory
from dattn_mcore.training.not_finite import NotFiniteError, explain
from dattn_mcore.training.optimizer import gathered_weights
from dattn_mcore.training.run_folder import Claim, claimed
from dattn_mcore.training.runtime import decide_runtime
from dattn_mcore.training.setup import Run, set_up
from dattn_mcore.training.signals import StopRequest
from dattn_mcore.training.step import StepResult, train_step
from dattn_mcore.training.watchdog import Watchdog
from dattn_mcore.types import IGNORED_LABEL

logger = logging.getLogger(__name__)


def train(
    config: Config,
    pg_collection: ProcessGroupCollection,
    device: torch.device,
    *,
    runtime: Runtime | None = None,
    watchdog: Watchdog | None = None,
) -> bool:
    """Trains until the last step or a stopping signal; called by all ranks.

    Args:
        config: a checked configuration.
        pg_collection: process groups of its layout.
        device: of this process.
        runtime: how the model is computed; None: it is decided here.
        watchdog: that this process has already; without one it gets one for this call.

    Returns:
        True if the run is complete, False if a signal stopped it.

    Raises:
        DattnError: a user's mistake, the same on every rank; what is one rank's alone is not
            `shared`.
    """
    if runtime is None:
        runtime = decide_runtime(config)
    with claimed(Path(config.log.run_dir), device) as claim:
        if watchdog is not None:
            with speaking(watchdog):
                return _train(set_up(config, runtime, pg_collection, device, watchdog), claim)
        watchdog = Watchdog(dist.get_rank(), dist.get_world_size())
        try:
            with speaking(watchdog):
                return _train(set_up(config, runtime, pg_collection, device, watchdog), claim)
        finally:
            watchdog.close()


def _train(run: Run, claim: Claim) -> bool:
    stop = StopRequest()
    try:
        with speaking(run.watchdog):
            step = _all_steps(run, stop, claim)
            run.hooks.saved(run.saver.poll(blocking=True))
            agree(claim.problem(), run.device)
    except DattnError as error:
        if error.shared:  # the same on every rank: a save that is under way is finished
            run.hooks.saved(run.saver.poll(blocking=True))
        raise
    finally:
        run.saver.close()
        stop.restore()
        run.data.close()
    _close(run, step)
    return step == run.last_step


def _all_steps(run: Run, stop: StopRequest, claim: Claim) -> int:
    """Steps until the last one or a stopping signal, and saves; returns the steps done by then.

    A run whose folder is gone stops as by a signal.
    """
    step = saved = run.first_step
    problem: DattnError | None = None
    while step < run.last_step:
        wants_stop = stop.received is not None or claim.is_gone()
        batch, agreed = _next_batch(run, step, wants_stop, problem)
        if agreed.stop:
            break
        assert batch is not None  # a rank without one has a problem, which all ranks raise
        result, share = _one_step(run, step, batch, agreed)
        step += 1
        _finish_pending(run, claim)
        problem = run.hooks.after_step(
            StepDone(
                step=step,
                last_step=run.last_step,
                result=result,
                batch=batch,
                agreed=agreed,
                communication_share=share,
            )
        )
        if step % run.config.checkpoint.save_interval == 0 or step == run.last_step:
            agree(problem, run.device)  # a run that must end saves no more
            if _save(run, step, claim):
                saved = step
    _save(run, step, claim, unsaved=step > saved)
    return step


def _finish_pending(run: Run, claim: Claim, blocking: bool = False) -> None:
    """Finishes an asynchronous save; one that lost its folder on the way is given up."""
    try:
        run.hooks.saved(run.saver.poll(blocking=blocking))
    except CheckpointError:
        if not _said_by_first(claim.is_gone()):
            raise


def _said_by_first(mine: bool) -> bool:
    """What rank 0, which looks after the folder, says to all."""
    said = [mine]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def _next_batch(
    run: Run, step: int, wants_stop: bool, problem: DattnError | None
) -> tuple[GlobalBatch | None, Agreement]:
    """The data of a step, and what all ranks say before it.

    Args:
        run: the run.
        step: 0-based.
        wants_stop: whether this process received a signal, or knows that the run cannot go on.
        problem: what this rank found wrong after the step before.

    Raises:
        DattnError: on every rank, a mistake that any rank found.
    """
    limit = run.config.health.step_timeout_seconds, "health.step_timeout_seconds"
    run.watchdog.phase(f"waiting for data of step {step + 1}", *limit)
    batch, asked = None, time.perf_counter()
    try:
        batch = run.data.global_batch(step)
    except RankError as error:  # its device may reach nobody
        raise RankError(f"{this_rank()}: {error}") from None
    except DattnError as error:
        problem = problem or error
    except Exception as error:  # noqa: BLE001 (whatever a decoder or a file system comes up with)
        doing = f"loading the data of step {step + 1}"
        problem = problem or unexpected(error, doing, Path(run.config.log.run_dir))
    waited = time.perf_counter() - asked
    run.watchdog.phase(f"step {step + 1}", *limit)
    return batch, agree(
        problem,
        run.device,
        stop=wants_stop,
        failures=batch.failures if batch is not None else (),
        data_wait=waited,
        peak_memory=platform.peak_memory(),
    )


def _one_step(
    run: Run, step: int, batch: GlobalBatch, agreed: Agreement
) -> tuple[StepResult, float | None]:
    """Trains on a batch without its failed samples.

    Returns:
        What the step did, and the share of communication in its time where that is measured.

    Raises:
        DattnError: the loss or a gradient is not finite; on every rank, before the update.
        OutOfMemoryError: on this rank alone.
    """
    failed = {failure.sample for failure in agreed.failures}
    micro_batches = [mask(item, failed) for item in batch.microbatches]
    inputs = all_model_inputs(micro_batches, run.config, run.pg_collection, run.device)
    flops = _model_flops(run.config, micro_batches)
    step_on = functools.partial(
        train_step, run.model, run.optimizer, run.scheduler, inputs, run.pg_collection, flops
    )
    log = run.config.log
    measures = dist.get_rank() == 0 and log.communication_share
    run.hooks.before_step(step + 1)
    try:
        if measures and (step + 1) % log.interval == 0:
            return with_communication_share(step_on)
        return step_on(), None
    except NotFiniteError as error:
        raise explain(error, step + 1, batch) from None
    except StepMemoryError as error:
        raise explain_memory(error, step + 1, micro_batches, inputs, run.config) from error


def _save(run: Run, step: int, claim: Claim, unsaved: bool = True) -> bool:
    """Saves what is not saved, or is gone with the folder; returns whether it did."""
    _finish_pending(run, claim, blocking=True)
    if not _said_by_first((unsaved or claim.is_gone()) and not claim.is_anothers()):
        return False
    limit = run.config.health.checkpoint_timeout_seconds
    run.watchdog.phase(f"saving after step {step}", limit, "health.checkpoint_timeout_seconds")
    run.hooks.before_save(step)
    with gathered_weights(run.model, run.config):
        folder = run.saver.save(step, metrics=run.hooks.metrics(step), hooks=run.hooks.state())
    run.hooks.saved(folder)
    run.hooks.after_save(step)
    return True


def _close(run: Run, step: int) -> None:
    """Lets the hooks write what concerns the whole run, and says how it ended."""
    agree(run.hooks.close(step, complete=step == run.last_step), run.device)
    run.saver.remove_old()  # the last save left what was still exported or scored
    if step < run.last_step:
        logger.info(
            "stopped by a signal at step %d of %d; start again to go on", step, run.last_step
        )


def _model_flops(config: Config, micro_batches: list[MicroBatch]) -> float:
    """Operations of this replica's packs, by their real rows."""
    total = 0.0
    for pack in micro_batches:
        labelled = int((pack.labels != IGNORED_LABEL).sum())
        rows = rows_of(config, pack.layouts, labelled, pack.images_of)
        total += sum(work.total for work in step_work(config, rows).values())
    return total
