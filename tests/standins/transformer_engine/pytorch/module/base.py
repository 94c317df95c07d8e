"""Buffers of overlapped exchanges: the call is kept, nothing is allocated."""

import enum

calls = []


class UserBufferQuantizationMode(enum.Enum):
    NONE = "none"
    FP8 = "fp8"


def initialize_ub(
    shape,
    tp_size,
    use_fp8=False,
    quantization_modes=None,
    dtype=None,
    ub_cfgs=None,
    bootstrap_backend=None,
):
    assert quantization_modes, "use_fp8 is deprecated"
    assert all(isinstance(mode, UserBufferQuantizationMode) for mode in quantization_modes)
    calls.append([shape, tp_size, [mode.value for mode in quantization_modes]])
