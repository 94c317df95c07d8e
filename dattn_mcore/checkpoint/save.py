"""Writes a checkpoint under a temporary name and renames it when it is whole.

A synchronous save returns when the checkpoint is whole. An asynchronous one stages it in memory,
leaves the writing to a forked process and the hashing to a thread, and is finished by a later call
of `poll`; training goes on in between. Either way nobody sees a checkpoint that is not whole.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from dattn_mcore.checkpoint import folders, fp8_scales, manifest, state
from dattn_mcore.checkpoint.files import begin_save
from dattn_mcore.checkpoint.reasons import ANY_FAILURE, reason
from dattn_mcore.checkpoint.retention import Retention
from dattn_mcore.config.optim_groups import layers_differ
from dattn_mcore.config.schema import Config
from dattn_mcore.data.index.identity import fingerprint_of
from dattn_mcore.errors import CheckpointError
from dattn_mcore.models.dattn import DattnModel
from dattn_mcore.orphans import end_forks_with_parent

logger = logging.getLogger(__name__)
RESERVE_BYTES = 16 << 20  # of the disk, while shards are written


@dataclass
class _Pending:
    """A save whose files are on their way."""

    final: Path
    manifest: dict[str, Any]
    hashing: threading.Thread | None = None
    hashed: dict[str, list[Any]] = field(default_factory=dict)
    problem: str | None = None

    @property
    def temporary(self) -> Path:
        """Where the files are until the checkpoint is whole."""
        return self.final.with_suffix(".tmp")

    @property
    def reserve(self) -> Path:
        """Holds space until the shards are written; not in the folder, which must be empty."""
        return self.final.with_name(".reserve")


class CheckpointSaver:
    """Saves the checkpoints of a run; every rank has one and calls it alike.

    Args:
        root: folder of checkpoints.
        config: written into each checkpoint; `checkpoint.asynchronous` chooses the way.
        chunks: this rank's model chunks, without DDP.
        optimizer: Megatron-Core's optimizer.
        pg_collection: process groups.
        data_identity: of the data set that positions refer to.
        tokenizer_fingerprint: of what made ids of its texts; an export takes the same.
        schedule_steps: that the learning rate's schedule takes.
        base: of a run with adapters: the checkpoint beside whose weights they learn.
        in_use: checkpoints that must not be deleted now; asked on the first rank.
    """

    def __init__(
        self,
        root: Path,
        config: Config,
        chunks: list[DattnModel],
        optimizer: MegatronOptimizer,
        pg_collection: ProcessGroupCollection,
        data_identity: dict[str, Any],
        tokenizer_fingerprint: str,
        schedule_steps: int,
        base: dict[str, str] | None = None,
        in_use: Callable[[], Collection[Path]] = tuple,
    ) -> None:
        self._in_use = in_use
        self.root, self.config, self.data_identity = root, config, data_identity
        self.tokenizer = manifest.describe_tokenizer(config, tokenizer_fingerprint)
        self.schedule_steps, self.base = schedule_steps, base
        self.chunks, self.optimizer, self.pg_collection = chunks, optimizer, pg_collection
        # More sharded tensors of the same save, made from the model's.
        self.beside: Callable[[dict[str, dict[str, Any]]], dict[str, Any]] = lambda model: {}
        self._calls = AsyncCallsQueue()
        self._results: SyncManager | None = None
        self._pending: _Pending | None = None
        self._saved: Path | None = None
        end_forks_with_parent()

    def save(
        self,
        step: int,
        *,
        metrics: dict[str, float] | None = None,
        hooks: dict[str, Any] | None = None,
    ) -> Path | None:
        """Saves model, optimizer, RNG and position; waits for an asynchronous save before it.

        Args:
            step: optimizer steps done; also the position in the data.
            metrics: newest value of each, by name.
            hooks: what the run's hooks remember, plain values by name.

        Returns:
            The finished folder; None where `poll` will finish it.

        Raises:
            CheckpointError: on every rank, if any could not write; older checkpoints stay intact.
        """
        self.poll(blocking=True)
        final = manifest.checkpoint_folder(self.root, step)
        layout = state.layout_of(self.pg_collection)
        pending = _Pending(final, self._manifest(step, layout, metrics or {}, hooks or {}))
        failure = None
        if dist.get_rank() == 0:
            try:
                _prepare(pending)
            except OSError as error:
                failure = reason(error)
        _raise_if_any(failure, pending)
        asynchronous = self.config.checkpoint.asynchronous
        filesystem_async._results_queue = self._results_queue(asynchronous)
        try:
            request = begin_save(
                self._content(step, layout), pending.temporary, self.pg_collection.dp_cp
            )
            request.finalize_fns.insert(0, functools.partial(_release, pending))
            if asynchronous:
                self._calls.schedule_async_request(request)
            else:
                request.execute_sync()
        except ANY_FAILURE as error:  # disk full, permissions: reported on every rank
            failure = reason(error)
        _raise_if_any(failure, pending)
        if asynchronous:
            self._pending = pending
            return None
        self._hash(pending)
        return self._finish(pending)

    def poll(self, blocking: bool = False) -> Path | None:
        """Finishes an asynchronous save whose files are written everywhere; called by all ranks.

        Args:
            blocking: wait until they are.

        Returns:
            The folder that became whole, or None.

        Raises:
            CheckpointError: on every rank, if any could not write.
        """
        pending = self._pending
        if pending is None:
            return None
        if pending.hashing is None:
            failure = None
            try:
                written = bool(self._calls.maybe_finalize_async_calls(blocking=blocking))
            except ANY_FAILURE as error:
                written, failure = True, reason(error)
            if not written:
                return None
            self._pending = None  # on every rank, where one could not finalize
            _raise_if_any(failure, pending)
            self._pending = pending
            pending.hashing = threading.Thread(target=self._hash, args=(pending,), daemon=True)
            pending.hashing.start()
        if blocking:
            pending.hashing.join()
        ready: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(ready, not pending.hashing.is_alive())
        if not all(ready):
            return None
        self._pending = None
        return self._finish(pending)

    def close(self) -> None:
        """Ends what an asynchronous save left running; one that is not finished is given up."""
        self._calls.close(abort=True)
        if self._results is not None:
            self._results.shutdown()

    def remove_old(self) -> None:
        """Deletes what should go beside the newest save, but was in use at that time."""
        if dist.get_rank() == 0 and self._saved is not None:
            self._remove_old(None, self._saved)

    def _content(self, step: int, layout: tuple[int, int]) -> dict[str, Any]:
        groups = self.pg_collection
        model = learning = state.model_state(self.chunks, groups, "run")
        if layers_differ(self.config):
            learning = state.model_state(self.chunks, groups, "run", by_layer=True)
        scales = fp8_scales.tensors_of(self.chunks)
        fp8_scales.share_newest(scales, groups)
        return {
            **model,
            **self.beside(model),
            "optimizer": state.optimizer_state(self.optimizer, learning, groups, is_loading=False),
            **({"fp8": fp8_scales.scales_state(scales, groups)} if scales else {}),
            "rng": state.rng_state(self.pg_collection, layout),
            "step": step,
        }

    def _results_queue(self, asynchronous: bool) -> Any:
        """Where the writer leaves what it wrote.

        Megatron-Core would start a manager process that imports everything again (seconds) and
        outlives a rank that is killed. A synchronous save needs no other process at all.
        """
        if not asynchronous:
            return queue.Queue()
        if self._results is None:
            self._results = SyncManager(ctx=multiprocessing.get_context("fork"))
            self._results.start()
        return self._results.Queue()

    def _manifest(
        self,
        step: int,
        layout: tuple[int, int],
        metrics: dict[str, float],
        hooks: dict[str, Any],
    ) -> dict[str, Any]:
        return manifest.new_manifest(
            self.config,
            step,
            self.tokenizer,
            layout=layout,
            data=self.data_identity,
            data_fingerprint=fingerprint_of(self.data_identity),
            schedule_steps=self.schedule_steps,
            metrics=metrics,
            hooks=hooks,
            base=self.base,
        )

    def _hash(self, pending: _Pending) -> None:
        """Size and SHA-256 of this rank's share of the files."""
        try:
            names = folders.data_files(pending.temporary)
            for name in names[dist.get_rank() :: dist.get_world_size()]:
                path = pending.temporary / name
                pending.hashed[name] = [path.stat().st_size, folders.digest(path)]
        except OSError as error:
            pending.problem = reason(error)

    def _finish(self, pending: _Pending) -> Path:
        _raise_if_any(pending.problem, pending)
        everyone: list[dict[str, list[Any]] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, pending.hashed)
        failure = None
        if dist.get_rank() == 0:
            files = {
                name: entry for part in everyone if part for name, entry in sorted(part.items())
            }
            try:
                manifest.write_manifest(pending.temporary, pending.manifest, files)
                folders.delete_export(pending.final)  # of what had this step's name before
                replaced = folders.put(pending.temporary, pending.final)
            except OSError as error:
                failure = reason(error)
            else:
                self._remove_old(replaced, pending.final)
        _raise_if_any(failure, pending)
        self._saved = pending.final
        return pending.final

    def _remove_old(self, replaced: Path | None, saved: Path) -> None:
        try:
            if replaced is not None:
                folders.delete(replaced)
            folders.remove_old(
                self.root, Retention.of(self.config.checkpoint), saved, self._in_use()
            )
        except OSError as error:  # the new one is whole: the next save tries again
            logger.warning("an older checkpoint in %s could not be deleted (%s)", self.root, error)


def _prepare(pending: _Pending) -> None:
    """An empty folder, and space for what Megatron-Core writes on one rank alone.

    Where one rank fails in between, the others would wait for it: `common.pt` comes first and the
    index last, and half of the space is for each.
    """
    if pending.temporary.exists():
        folders.delete(pending.temporary)
    pending.temporary.mkdir(parents=True)
    if RESERVE_BYTES:
        with pending.reserve.open("wb") as file:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
            file.truncate(RESERVE_BYTES // 2)


def _release(pending: _Pending) -> None:
    if dist.get_rank() == 0:
        with contextlib.suppress(OSError):
            pending.reserve.unlink(missing_ok=True)


def _raise_if_any(failure: str | None, pending: _Pending) -> None:
    """Ends a save that failed anywhere, on every rank; what it had written makes place."""
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    message = next((message for message in failures if message is not None), None)
    if message is None:
        return
    if dist.get_rank() == 0:
        with contextlib.suppress(OSError):
            pending.reserve.unlink(missing_ok=True)
            folders.delete(pending.temporary)
    raise CheckpointError(
        f"{pending.final} could not be written ({message}); free space or choose another "
        "log.run_dir. Earlier checkpoints are intact"
    )
