"""What a run computes with, found on each rank's machine; all ranks must find the same."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from dattn_mcore.config.schema import Config
from dattn_mcore.errors import ConfigError, DattnError
from dattn_mcore.layers.attention.triton_backend import launch_problem
from dattn_mcore.layers.runtime import Runtime
from dattn_mcore.parallel import on_cpu
from dattn_mcore.training.agreement import agree
from dattn_mcore.training.dry_run import attention_backends
from dattn_mcore.training.runtime import decide_runtime

logger = logging.getLogger(__name__)


def decide(config: Config, device: torch.device) -> Runtime:
    """Chooses attention backends and linears on every rank, and compares them; called by all.

    Args:
        config: a checked configuration.
        device: of this process, which is installed.

    Raises:
        ConfigError: on every rank; what was asked for cannot be used on a machine, or machines
            differ in what they have.
    """
    problem: DattnError | None = None
    chosen: dict[str, tuple[str, str]] = {}
    runtime: Runtime | None = None
    try:
        kind = "cpu" if device.type == "cpu" else "gpu"
        for layers, choice in attention_backends(config, kind):
            chosen[f"the attention backend of {layers}"] = choice.name, choice.reason
        runtime = decide_runtime(config)
        chosen["the implementation of linears and norms"] = runtime.implementation, ""
        fused = runtime.gradient_accumulation_fusion
        chosen["fusion of gradient accumulation"] = "on" if fused else "off", ""
        why = compile_where_possible(device)
        chosen["PyTorch's compiler"] = "off" if why else "on", why or ""
    except DattnError as error:
        problem = error
    agree(problem, device)
    assert runtime is not None  # else there is a problem, which all ranks raise
    check_same_choices(chosen)
    return runtime


def compile_where_possible(device: torch.device) -> str | None:
    """Leaves PyTorch's compiler off on a GPU where Triton, which it ends in, launches nothing.

    Megatron-Core compiles small functions (CLIP's activation among them) at their first call.

    Args:
        device: of this process, which is installed; on a CPU nothing is compiled anyway.

    Returns:
        Why it is off; None: it is not, or on a CPU.
    """
    if device.type == "cpu" or (problem := launch_problem(device)) is None:
        return None
    on_cpu.compile_nothing()
    logger.warning("PyTorch compiles nothing in this run: Triton: %s", problem)
    return problem


def check_same_choices(chosen: Mapping[str, tuple[str, str]]) -> None:
    """Compares choices of all ranks.

    Args:
        chosen: by what is chosen: its name, and why it was taken.

    Raises:
        ConfigError: on every rank; names the first rank that differs from rank 0, and its reason.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), dict(chosen)))
    first_host, first = everyone[0]
    for rank, (host, found) in enumerate(everyone):
        for what, (name, reason) in found.items():
            if name != first[what][0]:
                why = f" ({reason})" if reason else ""
                raise ConfigError(
                    f"rank {rank} on {host}: {what} is {name}{why}, and rank 0 on {first_host} "
                    f"has {first[what][0]}; install the same packages on all nodes, or choose one "
                    "that all have"
                )
