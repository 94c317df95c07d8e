"""Names that Megatron-Core imports and this project does not use."""

import contextlib

activation_recompute_forward = contextlib.nullcontext


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
