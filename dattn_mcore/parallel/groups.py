"""Process groups: torch.distributed and Megatron-Core's model parallel state."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import time
from collections.abc import Iterator

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from dattn_mcore.errors import ConfigError, RankError, first_line
from dattn_mcore.parallel import announcements, fewer_passes, platform, torch_adam

_POLL_SECONDS = 0.1


def join_store(timeout_seconds: float) -> tuple[dist.Store, int, int]:
    """The store that torchrun's processes share, this rank and the world size.

    Raises:
        RankError: the store cannot be reached, or not all processes came.
        ConfigError: the environment does not say where it is.
    """
    timeout = datetime.timedelta(seconds=timeout_seconds)
    try:
        return next(dist.rendezvous("env://", timeout=timeout))
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        kind = ConfigError if isinstance(error, ValueError) else RankError
        raise kind(
            f"rank {os.environ.get('RANK')} on {socket.gethostname()} cannot join the run at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} within "
            f"{timeout_seconds:g} seconds ({reason}); check that all ranks started with one "
            "address and that the network lets them through"
        ) from None


def initialize_distributed(
    device: str, store: dist.Store, rank: int, world_size: int, timeout_minutes: float
) -> None:
    """Makes the process group of all ranks over a store from `join_store`."""
    timeout = datetime.timedelta(minutes=timeout_minutes)
    store.set_timeout(timeout)
    dist.init_process_group(
        platform.backend(device),
        store=dist.PrefixStore("default_pg", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )


def wait_for_all(name: str) -> None:
    """Waits until every rank has come here, however long one takes.

    A collective would end the run after `parallel.timeout_minutes`. Only for what happens once:
    a second wait under the same name returns at once.

    Args:
        name: of what is waited for; the same on every rank.
    """
    store = dist.distributed_c10d._get_default_store()
    store.add(name, 1)
    while store.add(name, 0) < dist.get_world_size():
        time.sleep(_POLL_SECONDS)


def initialize_model_parallel(
    *, seed: int, tp: int = 1, pp: int = 1, vpp: int = 1, cp: int = 1
) -> ProcessGroupCollection:
    """Creates Megatron-Core's groups for a layout, and seeds its RNG tracker.

    Args:
        seed: of the run; each pipeline stage and tensor rank derives its own.
        tp: ranks of a tensor parallel group; the world size must be a multiple of tp * pp * cp.
        pp: pipeline stages.
        vpp: model chunks of a stage.
        cp: ranks of a context parallel group.

    Returns:
        The groups, to be passed to whoever communicates.
    """
    torch_adam.install()
    fewer_passes.install()
    announcements.hide()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        context_parallel_size=cp,
        **platform.settings_of_groups(),
    )
    platform.seed_model_parallel(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def destroy_model_parallel() -> None:
    """Forgets Megatron-Core's groups; torch.distributed stays."""
    parallel_state.destroy_model_parallel()


def initialize_alone(device: str) -> None:
    """A world of this one process, without torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, 1, is_master=True)
    dist.init_process_group(platform.backend(device), store=store, rank=0, world_size=1)


@contextlib.contextmanager
def single_process(device: str = "cpu") -> Iterator[ProcessGroupCollection]:
    """A world of one process, for tools that need Megatron-Core without torchrun."""
    platform.install(device)
    initialize_alone(device)
    try:
        yield initialize_model_parallel(seed=1)
    finally:
        destroy_model_parallel()
        dist.destroy_process_group()
