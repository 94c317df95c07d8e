"""Why PyTorch or Megatron-Core could not read or write a checkpoint, in one line."""

from __future__ import annotations

import pickle

from torch.distributed.checkpoint.api import CheckpointException

# What both raise; PyTorch's own is no `Exception`, but a `BaseException`.
ANY_FAILURE = (Exception, CheckpointException)


def reason(error: BaseException) -> str:
    """The first line of what went wrong; of PyTorch's collection of all ranks, of the first one."""
    if isinstance(error, CheckpointException) and error.failures:
        error = error.failures[min(error.failures)][0]
    if isinstance(error, pickle.UnpicklingError):  # PyTorch's text advises to let the code run
        return "a shard holds what is no tensor and could run code, or is damaged"
    text = str(error).strip().removeprefix("Worker failure: ").split("\n", 1)[0]
    name = type(error).__name__
    if not text or text.startswith("[Errno"):
        return text or name
    return f"{name}: {text}"
