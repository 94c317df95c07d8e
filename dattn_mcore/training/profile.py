"""Profiles a window of steps: PyTorch's trace of this rank, GPU memory, or NVTX ranges.

Files go to run_dir/profile: `steps_11-13_rank0.json.gz` opens in Perfetto (https://ui.perfetto.dev)
as it is, `..._memory.pickle` in https://docs.pytorch.org/memory_viz. NVTX ranges are for Nsight
Systems, which uses the same interface of the driver as PyTorch's profiler: it is one or the other.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from torch.profiler import profile, record_function

from dattn_mcore.config.profile_rules import NVTX_NEEDS_GPU, beyond
from dattn_mcore.config.schema import Config, ProfileConfig
from dattn_mcore.errors import ConfigError
from dattn_mcore.parallel import platform
from dattn_mcore.training.hooks import Hook, StepDone

logger = logging.getLogger(__name__)
FOLDER = "profile"  # in the run's folder


class Profile(Hook):
    """Records steps of one rank. Slows them down, and the first of them most.

    The window is whole steps: from before the first one's forward pass to after the last one's
    update, with the waits for data between them. A run that is resumed within the window records
    what is left of it; one that is stopped there writes what it has.

    Args:
        settings: `start` is a step.
        run_dir: of the run.
        rank: this one.
        first_step: steps that are done when the run starts or resumes.
    """

    def __init__(
        self, settings: ProfileConfig, run_dir: Path, *, rank: int, first_step: int
    ) -> None:
        assert settings.start is not None
        self._settings, self._folder, self._rank = settings, run_dir / FOLDER, rank
        self._first = max(settings.start, first_step + 1)
        self._last = settings.start + settings.steps - 1
        self._open = False
        self._profiler: Any = None  # none with NVTX ranges
        self._step = contextlib.ExitStack()  # what ends with a step
        self._window = contextlib.ExitStack()  # what ends with the window

    def before_step(self, step: int) -> None:
        """Begins the window, and the range of a step in it."""
        if step == self._first and step <= self._last:
            self._begin()
        if self._open:
            name = f"step {step}"
            self._step.enter_context(record_function(name))
            if self._settings.nvtx:
                self._step.enter_context(platform.nvtx_range(name))

    def after_step(self, done: StepDone) -> None:
        """Ends the range of a step, and the window after its last one.

        Raises:
            OSError: the files cannot be written.
        """
        if not self._open:
            return
        platform.synchronize()
        self._step.close()
        if done.step == self._last:
            self._write(done.step)

    def close(self, step: int, complete: bool) -> None:
        """Writes what was recorded of a window that a signal ended."""
        if self._open:
            self._step.close()
            self._write(step)

    def _begin(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        platform.synchronize()
        if self._settings.memory:
            platform.record_memory_history()
        if self._settings.nvtx:
            self._window.enter_context(platform.nvtx_capture())
        else:
            self._profiler = profile(
                activities=platform.traced_activities(),
                record_shapes=True,
                profile_memory=self._settings.memory,
            )
            self._window.enter_context(self._profiler)
        self._open = True

    def _write(self, step: int) -> None:
        self._open = False
        self._window.close()
        stem = f"steps_{self._first}-{step}_rank{self._rank}"
        if self._profiler is not None:
            trace = self._folder / f"{stem}.json.gz"
            self._profiler.export_chrome_trace(str(trace))
            self._profiler = None
            logger.info("profile of steps %d to %d in %s", self._first, step, trace)
        if self._settings.memory:
            platform.write_memory_snapshot(self._folder / f"{stem}_memory.pickle")


def profile_hooks(
    config: Config, *, rank: int, world_size: int, first_step: int, last_step: int, device: str
) -> list[Hook]:
    """The hook of this rank, if it has one; called by all ranks.

    Args:
        config: a checked configuration.
        rank: this one.
        world_size: processes of the run.
        first_step: steps that are done.
        last_step: steps after which the run is complete.
        device: `cpu` or `gpu`.

    Raises:
        ConfigError: on every rank: the window is not in the run, a rank does not exist, or NVTX
            is asked for without a GPU.
    """
    settings = config.profile
    if settings.start is None:
        return []
    mistakes = []
    if problem := beyond(config, last_step):
        mistakes.append(problem)
    missing = [one for one in settings.ranks if one >= world_size]
    if missing:
        mistakes.append(
            f"profile.ranks={list(settings.ranks)}: there is no rank {missing[0]} in a run of "
            f"{world_size} process{'' if world_size == 1 else 'es'}; name ranks from 0 to "
            f"{world_size - 1}"
        )
    if settings.nvtx and device == "cpu":
        mistakes.append(NVTX_NEEDS_GPU)
    if mistakes:
        raise ConfigError(*mistakes)
    if rank not in settings.ranks:
        return []
    if first_step >= settings.start + settings.steps - 1:
        logger.info("the steps of profile.start=%d are done already", settings.start)
        return []
    return [Profile(settings, Path(config.log.run_dir), rank=rank, first_step=first_step)]
