"""Restarts a run that was started as one process under as many local processes as it needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from dattn_mcore.console import say
from dattn_mcore.errors import ConfigError

# This process's place, as torchrun gave it; a new torchrun must not inherit it.
_TORCHRUN_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_ERROR_FILE",
    "OMP_NUM_THREADS",
)


def restart_under_torchrun(
    processes: int, device: str, arguments: Sequence[str], program: Sequence[str] = ()
) -> int:
    """Replaces this process by torchrun with the given number of local processes.

    Args:
        processes: how many the layout needs.
        device: `train.device`; on GPUs each process needs one of its own.
        arguments: command line after the program's name.
        program: what torchrun starts; the running script if absent.

    Raises:
        ConfigError: the machine has too few GPUs.
    """
    from dattn_mcore.parallel import platform

    if platform.resolve_device(device) == "gpu" and platform.gpu_count() < processes:
        raise ConfigError(
            f"tp x pp x cp needs {processes} processes with a GPU each, and this machine has "
            f"{platform.gpu_count()} GPUs; start torchrun on more nodes, choose a smaller --tp or "
            "--pp, or use --device cpu"
        )
    started = [*(program or sys.argv[:1]), *arguments]
    say(
        f"one process started and {processes} needed: restarting as "
        f"torchrun --nproc-per-node {processes} {' '.join(started)}"
    )
    sys.stdout.flush()
    environment = {k: v for k, v in os.environ.items() if k not in _TORCHRUN_VARIABLES}
    environment["OMP_NUM_THREADS"] = "1"  # torchrun's own default, which it would announce
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        *started,
    ]
    os.execve(sys.executable, command, environment)
