"""Optional packages: whether they can be imported, and what keeps a broken one from the rest.

A compiled package that does not fit this PyTorch, driver or cuDNN raises anything when it is
imported. Megatron-Core tries several packages while it is imported, and goes on without those that
raise ImportError; whatever else one raises would end every command.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Sequence

from dattn_mcore.errors import first_line

ABSENT = "is not installed"
# What Megatron-Core 0.16.1 to 0.19.2 try on the way to the modules that this project uses; and
# `platform.ADDS_GRADIENTS`.
TRIED_BY_MEGATRON = (
    "transformer_engine.pytorch",
    "triton",
    "apex.optimizers",
    "amp_C",
    "flash_attn",
    "flash_attn_3.flash_attn_interface",
    "flashattn_hopper.flash_attn_interface",
    "flash_mla",
    "flashinfer",
    "deep_ep",
    "einops",
    "torch_memory_saver",
    # From 0.19 on.
    "emerging_optimizers",
    "multistorageclient",
    "nvidia_resiliency_ext.checkpointing.async_ckpt.core",
)
_hidden: dict[str, str] = {}  # what is wrong with each package that `hide_broken` hid


@functools.cache
def import_problem(module: str) -> str | None:
    """Why a module cannot be used; None where it can. Imports it, and remembers the answer.

    Args:
        module: dotted name.
    """
    package = module.partition(".")[0]
    if package in _hidden:
        return _hidden[package]
    if not _is_there(package):
        return ABSENT
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 (it raises anything, or gives up)
        reason = first_line(error) if isinstance(error, Exception) else f"it exits with {error}"
        return f"cannot be imported ({reason})"
    return None


def hide_broken(modules: Sequence[str]) -> None:
    """Makes packages that are installed and broken look absent; before Megatron-Core's import.

    Called by entry points, never at import. What is wrong with one stays in `import_problem`.

    Args:
        modules: dotted names; where one cannot be imported, its whole package is hidden.
    """
    for module in modules:
        problem = import_problem(module)
        if problem is not None and problem != ABSENT:
            _hide(module.partition(".")[0], problem)


def _is_there(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


def _hide(package: str, problem: str) -> None:
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        del sys.modules[name]
    sys.modules[package] = None  # type: ignore[assignment]  # Python's mark of what is not there
    _hidden[package] = problem
