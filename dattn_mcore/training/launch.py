"""Restarts a run that was started as one process under as many local processes as it needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from dattn_mcore.console import say
from dattn_mcore.errors import ConfigError

# How names begin of what torchrun gives a rank: its place, and where the others are.
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


def without_rank(given: Mapping[str, str]) -> dict[str, str]:
    """An environment for a process that is no rank of this run.

    Args:
        given: variables of this process.
    """
    return {name: value for name, value in given.items() if not name.startswith(_OF_A_RANK)}


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
    from dattn_mcore.parallel import gpus

    if gpus.resolve_device(device) == "gpu" and gpus.gpu_count() < processes:
        raise ConfigError(
            f"tp x pp x cp needs {processes} processes with a GPU each, and this machine has "
            f"{gpus.gpu_count()} GPUs; start torchrun on more nodes, choose a smaller --tp or "
            "--pp, or use --device cpu"
        )
    started = [*(program or sys.argv[:1]), *arguments]
    say(
        f"one process started and {processes} needed: restarting as "
        f"torchrun --nproc-per-node {processes} {' '.join(started)}"
    )
    sys.stdout.flush()
    environment = without_rank(os.environ)
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
