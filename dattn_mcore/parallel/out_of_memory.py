"""Whether an error means that an allocation failed, on the device or on the host."""

from __future__ import annotations

import errno

import torch

# PyTorch has a type for the device's own allocator; the CPU's and the vendor's libraries raise a
# RuntimeError of many meanings.
_SAID = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "error: out of memory",
    "failure 'out of memory'",
    "_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tells it by the type, or by what the library says."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):  # of a fork or a memory map
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)
