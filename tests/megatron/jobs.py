"""What runs under another release of Megatron-Core, in a process of its own.

Usage: python -m tests.megatron.jobs JOB FOLDER [ARGUMENT]. Prints a JSON object.

`imports`: what of Megatron-Core the project imports, and why where that fails. `train`: trains two
steps, saves, and trains the third. `resume`: does the third step from a checkpoint. `fixes`: which
of `parallel.torch_adam`'s fixes are no longer needed.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS = 3


def imports() -> dict[str, str]:
    """Why names of Megatron-Core that the project imports cannot be had; empty: all can."""
    found = {}
    for file in [*(ROOT / "dattn_mcore").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron"):
                for alias in node.names:
                    problem = _problem(str(node.module), alias.name)
                    if problem is not None:
                        found[f"{node.module}.{alias.name}"] = problem
    return found


def _problem(module: str, name: str) -> str | None:
    if module.endswith(".transformer_engine"):  # needs that package
        return None
    try:
        if hasattr(importlib.import_module(module), name):
            return None
        importlib.import_module(f"{module}.{name}")
    except Exception as error:  # noqa: BLE001 (a release for another Python raises anything)
        return f"{type(error).__name__}: {error}"
    return None
