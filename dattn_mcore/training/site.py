"""What of a machine and its environment cannot run a configuration, before anything is built."""

from __future__ import annotations

import os
from collections.abc import Mapping

from dattn_mcore.config.schema import Config
from dattn_mcore.errors import ConfigError
from dattn_mcore.parallel import platform

# Transformer Engine's switches of its attention; Megatron-Core asserts their values.
_OF_ATTENTION = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
_IN_ANY_ORDER = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"


def check_site(config: Config, device_kind: str, local_rank: int) -> None:
    """Uses the device once, and looks at the environment.

    Args:
        config: a checked configuration.
        device_kind: cpu or gpu.
        local_rank: index of this process on its machine.

    Raises:
        ConfigError: this configuration cannot run here.
        FaultError: this process's GPU does not compute.
    """
    platform.check_device(device_kind, local_rank)
    problems = (
        fp8_without_gpu(config, device_kind),
        attention_variables(os.environ),
        unordered_variable(config, os.environ),
    )
    found = [problem for problem in problems if problem is not None]
    if found:
        raise ConfigError(*found)


def fp8_without_gpu(config: Config, device_kind: str) -> str | None:
    """Why a run in FP8 cannot take this device; None where it can, or has no FP8."""
    if config.train.fp8 == "none" or device_kind != "cpu":
        return None
    return (
        f"train.fp8={config.train.fp8} needs a GPU, and train.device={config.train.device} finds "
        "none on this machine; use train.fp8=none, or start on a machine with a GPU"
    )


def attention_variables(environment: Mapping[str, str]) -> str | None:
    """Which variables a site has set that Megatron-Core refuses; None: no such.

    It sets all three to 1, and asserts that nobody has set them to anything else. They choose the
    vision tower's attention alone; that of the decoder is attention.backend.
    """
    wrong = [name for name in _OF_ATTENTION if environment.get(name) not in (None, "1")]
    if not wrong:
        return None
    values = ", ".join(f"{name}={environment[name]!r}" for name in wrong)
    return f"the environment has {values}, which Megatron-Core refuses; unset {' '.join(wrong)}"


def unordered_variable(config: Config, environment: Mapping[str, str]) -> str | None:
    """Why a deterministic run cannot have this environment; None where it can."""
    value = environment.get(_IN_ANY_ORDER)
    if not config.train.deterministic or value in (None, "0"):
        return None
    return (
        f"train.deterministic=true needs {_IN_ANY_ORDER}=0 in the environment, which has "
        f"{value!r}; unset {_IN_ANY_ORDER}"
    )
