"""One launch of a trivial kernel: Triton compiles what launches kernels at first use, in C."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _count(number):
    tl.store(number, tl.load(number) + 1)


def launch(device: torch.device) -> None:
    """Compiles and runs it.

    Raises:
        Exception: of any class, where Triton cannot.
        RuntimeError: the kernel's result is wrong.
    """
    number = torch.zeros(1, dtype=torch.int32, device=device)
    _count[(1,)](number)
    if number.item() != 1:
        raise RuntimeError(f"a trivial kernel gives {number.item()} instead of 1")
