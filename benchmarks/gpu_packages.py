"""Says which parts of `make gpu-check` are skipped on this machine, for want of which package.

    python -m benchmarks.gpu_packages

One line for each package that cannot be used, with how to install it; nothing where all can.
Exit status 1: Transformer Engine is among them.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch

from dattn_mcore.parallel import entry
from dattn_mcore.parallel.packages import import_problem
from dattn_mcore.training.implementation import transformer_engine_missing

INSTALL = "install it with .venv/bin/pip install "


class OptionalPackage(NamedTuple):
    """What needs a package, why that cannot be used here (None: it can), and how to get it."""

    package: str
    skipped: str
    problem: str | None
    install: str


def parts() -> list[OptionalPackage]:
    """Every optional package of a GPU machine; imports them, which may touch the device."""
    entry.prepare_imports("gpu")
    # After it: Megatron-Core's import dies of a broken Transformer Engine.
    from dattn_mcore.layers.attention import BACKENDS, AttentionOptions

    plain = (AttentionOptions(scale=1.0), "gpu", torch.bfloat16, 128)  # every backend computes it
    return [
        OptionalPackage(
            "Transformer Engine",
            "its losses and checkpoints, every FP8 recipe, their accuracy and their speed",
            transformer_engine_missing(),
            INSTALL
            + "--no-build-isolation '.[te]', or go without: make gpu-check ARGS=--without-te",
        ),
        OptionalPackage(
            "flash-attn",
            "its kernels' tests and times",
            BACKENDS["flash"].refuses(*plain),
            INSTALL + "--no-build-isolation '.[flash]'",
        ),
        OptionalPackage(
            "Triton",
            "the joint kernel's tests and times",
            BACKENDS["triton"].refuses(*plain),
            INSTALL + "'.[triton]'",
        ),
        OptionalPackage(
            "DALI", "decoding on the GPU", import_problem("nvidia.dali"), INSTALL + "'.[dali]'"
        ),
    ]


def main() -> int:
    """Writes the lines; see the file's docstring."""
    missing = [part for part in parts() if part.problem is not None]
    for part in missing:
        sys.stdout.write(
            f"skipped without {part.package}: {part.skipped} ({part.problem}); {part.install}\n"
        )
    return int(any(part.package == "Transformer Engine" for part in missing))


if __name__ == "__main__":
    sys.exit(main())
