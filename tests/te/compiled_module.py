"""Transformer Engine's real Python package on a CPU: PyTorch stands in for its compiled module.

`transformer_engine_torch` has kernels and enums. Of its kernels those are here that Megatron-Core's
layers of this project come to; any other says its name when it is called. The device is said to be a
Hopper GPU, so that the package takes the ways that it takes there.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import os
import sys
import types
import warnings
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.te import casts, multi_tensor, norms, products
from tests.te.casts import DType

_FORWARD = [f"GEMM{n}_{kind}" for n in (1, 2, 3) for kind in ("INPUT", "WEIGHT", "OUTPUT")]
_BACKWARD = [f"{kind}{n}" for n in (1, 2, 3) for kind in ("GRAD_OUTPUT", "GRAD_INPUT")]
# What a Hopper GPU with CUDA 13.0 reports.
CUDA_VERSION, CUBLAS_VERSION, CUDNN_VERSION = "13.0", 130100, 91400
EXPORTERS = ("onnx", "onnxscript")  # older releases import them at once
HOPPER = types.SimpleNamespace(
    major=9, minor=0, name="H100", multi_processor_count=132, total_memory=80 << 30
)


class _AnyName(type):
    """A class of constants: each name that is asked for becomes another number."""

    def __getattr__(cls, name: str) -> Any:
        if name == "__members__":
            return {name: value for name, value in vars(cls).items() if name[0] != "_"}
        if name.startswith("__"):
            raise AttributeError(name)
        number = len(vars(cls))
        setattr(cls, name, number)
        return number


class _NoBackend(int):
    """No fused attention: the number alone for older releases, with the reason for newer ones."""

    def __iter__(self) -> Iterator[Any]:
        return iter((int(self), "there are no kernels here"))


def _enum(name: str, members: list[str]) -> Any:
    return enum.IntEnum(name, members, start=0)


class CompiledModule(types.ModuleType):
    """`transformer_engine_torch`: what is set, classes of constants, and kernels that raise."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            made: Any = _AnyName(name, (), {})
        else:

            def made(*args: Any, **kwargs: Any) -> Any:
                raise NotImplementedError(f"transformer_engine_torch.{name} has no stand-in")

        setattr(self, name, made)
        return made


def compiled_module() -> CompiledModule:
    """The module, with the kernels of this folder."""
    module = CompiledModule("transformer_engine_torch")
    for place in (casts, multi_tensor, norms, products):
        for name, value in vars(place).items():
            own = getattr(value, "__module__", None) == place.__name__
            if own and isinstance(value, types.FunctionType) and not name.startswith("_"):
                setattr(module, name, value)
    module.DType = DType
    module.FP8FwdTensors = _enum("FP8FwdTensors", _FORWARD)
    module.FP8BwdTensors = _enum("FP8BwdTensors", _BACKWARD)
    module.Float8BlockScaleTensorFormat = _enum(
        "Float8BlockScaleTensorFormat", ["GEMM_READY", "COMPACT"]
    )
    module.get_cublasLt_version = lambda: CUBLAS_VERSION
    module.get_cudnn_version = lambda: CUDNN_VERSION
    module.get_num_cublas_streams = lambda: 4
    none = _NoBackend(module.NVTE_Fused_Attn_Backend.NVTE_No_Backend)
    module.get_fused_attn_backend = lambda *args, **kwargs: none
    return module


def _on_the_cpu(make: Any) -> Any:
    """A factory of tensors for which a GPU's name means the CPU."""

    def made(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        on_gpu = str(device).startswith("cuda")
        return make(*args, device="cpu" if on_gpu else device, **kwargs)

    return made


def _exporter(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__getattr__ = lambda name: mock.MagicMock()  # type: ignore[method-assign]
    return module


def install(folder: Path) -> None:
    """Has this process import Transformer Engine from a folder, on the CPU; once, before all others.

    Args:
        folder: from `tests.te.releases.folder_of`.
    """
    assert "transformer_engine" not in sys.modules
    sys.path.insert(0, str(folder))
    sys.modules["transformer_engine_torch"] = compiled_module()
    torch.version.cuda = CUDA_VERSION
    # Its layers ask whether there is a GPU and whether rows are on it. There is still none to count.
    torch.cuda.is_available = lambda: True
    torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment,misc]
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment,misc]
    torch.cuda.nvtx.range = lambda *args: contextlib.nullcontext()
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *args: None
    torch.cuda.get_device_properties = lambda *args: HOPPER  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *args: (HOPPER.major, HOPPER.minor)
    # Its setup sets this variable, so that libraries of CUDA are not looked for.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    # In a backward pass inside another one the CPU platform does not see what is asked for.
    torch.empty, torch.zeros = _on_the_cpu(torch.empty), _on_the_cpu(torch.zeros)
    for exporter in EXPORTERS:
        sys.modules[exporter] = _exporter(exporter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its first try finds no compiled module
        common = importlib.import_module("transformer_engine.common")
        common.load_framework_extension = lambda framework: None
        te = importlib.import_module("transformer_engine")
        te.pytorch = importlib.import_module("transformer_engine.pytorch")
    for exporter in EXPORTERS:
        del sys.modules[exporter]
