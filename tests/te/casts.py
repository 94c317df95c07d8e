"""FP8 of the compiled module: casts with their scales, in PyTorch's float8 dtypes.

Source: Transformer Engine's `quantized_tensor.py` and `tensor/` say which buffers a tensor has; its
kernels (`common/`) how scales are found. The devices are Hopper's: a product reads transposed operands
from a transposed copy.
"""

from __future__ import annotations

import enum
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

BLOCK = 128


class DType(enum.IntEnum):
    """Transformer Engine's."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


# Keys of both releases' enums are equal to these numbers.
DTYPES = {
    int(DType.kByte): torch.uint8,
    int(DType.kInt32): torch.int32,
    int(DType.kFloat32): torch.float32,
    int(DType.kFloat16): torch.float16,
    int(DType.kBFloat16): torch.bfloat16,
    int(DType.kFloat8E4M3): torch.float8_e4m3fn,
    int(DType.kFloat8E5M2): torch.float8_e5m2,
}


def is_quantized(x: Any) -> bool:
    """Whether it is one of Transformer Engine's FP8 tensors."""
    return hasattr(x, "_fp8_dtype")


def result_of(value: torch.Tensor, dtype: Any, quantizer: Any, out: Any) -> Any:
    """A kernel's result (float32) as it is asked for: a dtype, or FP8, or into a tensor."""
    torch_dtype = dtype if isinstance(dtype, torch.dtype) else DTYPES[int(dtype)]
    value = value.to(torch_dtype)
    if quantizer is not None:
        return quantize(value, quantizer, out)
    return value if out is None else out.copy_(value)


def quantize(tensor: torch.Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    """An FP8 tensor of any shape, new or written into `output`; nothing where `noop` says so."""
    if noop is not None and bool(noop.item()):
        return output
    with torch.no_grad():
        if type(quantizer).__name__ == "Float8BlockQuantizer":
            return _by_blocks(tensor, quantizer, output)
        return _by_tensor(tensor, quantizer, output)


def create_empty_quantized_tensor(
    quantizer: Any, shape: list[int], dtype: torch.dtype, device: Any, pin_memory: bool = False
) -> Any:
    """One of zeros."""
    return quantize(torch.zeros(shape, dtype=dtype), quantizer)


def bgrad_quantize(tensor: torch.Tensor, quantizer: Any) -> list[Any]:
    """The sum over rows, and the FP8 tensor."""
    return [tensor.flatten(0, -2).float().sum(0).to(tensor.dtype), quantize(tensor, quantizer)]


def dequantize(tensor: Any, otype: Any) -> torch.Tensor:
    """A tensor of its shape."""
    dtype = DTYPES[int(otype)]
    return operand(tensor, rowwise=_has_rows(tensor)).to(dtype).view(tuple(tensor.size()))


def fp8_transpose(input: torch.Tensor, dtype: Any, *, out: torch.Tensor | None = None) -> Any:
    """Bytes with the last dimension first."""
    turned = input.flatten(0, -2).t().contiguous().view(input.shape[-1], *input.shape[:-1])
    return turned if out is None else out.copy_(turned)


def compute_amax(input: torch.Tensor, amax: torch.Tensor) -> None:
    """Largest magnitude."""
    amax.copy_(input.detach().abs().max().float())


def fused_amax_and_scale_update_after_reduction(
    amax_reduction_buffer: torch.Tensor,
    amax_histories: list[torch.Tensor],
    scales: list[torch.Tensor],
    amax_compute_algo: str,
    fp8_dtype: Any,
    margin: float,
) -> None:
    """Delayed scaling: scales from the histories of largest magnitudes, which move on by a row."""
    largest = torch.finfo(DTYPES[int(fp8_dtype)]).max * 2.0**-margin
    start = 0
    for history, scale in zip(amax_histories, scales, strict=True):
        newest = amax_reduction_buffer[start : start + history.shape[1]]
        start += history.shape[1]
        # The reduced values come last, as the newest; the first row is for the next step.
        rolled = torch.cat([history[1:], newest[None]])
        amax = rolled.max(0).values if amax_compute_algo == "max" else newest.clone()
        history.copy_(rolled)
        history[0].zero_()
        usable = torch.isfinite(amax) & (amax > 0)
        scale.copy_(torch.where(usable, largest / amax, scale))


def operand(x: Any, rowwise: bool) -> torch.Tensor:
    """[rows, columns] in float32, read as a product does: from rows or from the transposed copy."""
    if not is_quantized(x):
        return x.detach().reshape(-1, x.shape[-1]).float()
    dtype = DTYPES[int(x._fp8_dtype)]
    if hasattr(x, "_rowwise_data"):
        return _operand_of_blocks(x, rowwise, dtype)
    if rowwise:
        assert x._data is not None, "an FP8 product reads rows that were not kept"
        return x._data.reshape(-1, x._data.shape[-1]).view(dtype).float() * x._scale_inv
    assert x._transpose is not None and not x._transpose_invalid, (
        "an FP8 product reads a transposed copy that was not made"
    )
    turned = x._transpose.reshape(x._transpose.shape[0], -1)
    return (turned.view(dtype).float() * x._scale_inv).t()


def _has_rows(x: Any) -> bool:
    return (x._rowwise_data if hasattr(x, "_rowwise_data") else x._data) is not None


def _largest(dtype: Any) -> float:
    return torch.finfo(DTYPES[int(dtype)]).max


def _cast(scaled: torch.Tensor, dtype: Any) -> torch.Tensor:
    """Bytes; what is too large becomes the largest number, as on the device."""
    largest = _largest(dtype)
    return scaled.clamp(-largest, largest).to(DTYPES[int(dtype)]).view(torch.uint8)


def _scales(amax: torch.Tensor, quantizer: Any) -> torch.Tensor:
    amax = amax.clamp(min=quantizer.amax_epsilon)
    scale = _largest(quantizer.dtype) / amax
    scale = torch.where(torch.isfinite(scale) & (amax > 0), scale, 1.0)
    return torch.exp2(torch.floor(torch.log2(scale))) if quantizer.force_pow_2_scales else scale


def _storage(quantizer: Any, name: str) -> Any:
    """Class of the tensors of a quantizer that are for internal use: its name has changed."""
    module = sys.modules[type(quantizer).__module__]
    return getattr(module, f"{name}Storage", None) or getattr(module, f"{name}Base")


def _by_tensor(tensor: torch.Tensor, quantizer: Any, output: Any) -> Any:
    """One scale for all: from the history (delayed scaling) or from the tensor itself."""
    values = tensor.detach().float()
    amax = values.abs().max() if values.numel() else values.new_zeros(())
    if type(quantizer).__name__ == "Float8Quantizer":
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
        scale = quantizer.scale.reshape(1)
    else:
        amax = amax.reshape(1)
        if quantizer.with_amax_reduction:
            group = quantizer.amax_reduction_group
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
        scale = _scales(amax, quantizer)
    data = _cast(values * scale, quantizer.dtype)
    turned = fp8_transpose(data, None) if quantizer.columnwise_usage and data.dim() > 1 else None
    if output is not None:
        if output._data is not None:
            output._data.copy_(data.view(output._data.shape))
        if turned is not None:
            output._transpose = turned
            output._transpose_invalid = False
        elif output._transpose is not None:
            output._transpose_invalid = True
        output._scale_inv.copy_(1 / scale)
        return output
    fields = dict(
        data=data if quantizer.rowwise_usage else None,
        fp8_scale_inv=1 / scale,
        fp8_dtype=quantizer.dtype,
        data_transpose=turned,
        quantizer=quantizer,
    )
    storage = _storage(quantizer, "Float8Tensor")
    if quantizer.internal:
        if storage.__name__.endswith("Storage"):
            fields["fake_dtype"] = tensor.dtype
        return storage(**fields)
    public = sys.modules[type(quantizer).__module__].Float8Tensor
    return public(shape=tensor.shape, dtype=tensor.dtype, requires_grad=False, **fields)


def _by_blocks(tensor: torch.Tensor, quantizer: Any, output: Any) -> Any:
    """A scale for each 1 x 128 numbers (rows; columns apart), or for each 128 x 128 (weights)."""
    values = tensor.detach().float().reshape(-1, tensor.shape[-1])
    compact = (
        bool(getattr(quantizer, "all_gather_usage", False)) and quantizer.block_scaling_dim == 1
    )
    fields: dict[str, Any] = {}
    for way in ("rowwise", "columnwise"):
        if not getattr(quantizer, f"{way}_usage"):
            fields[f"{way}_data"] = fields[f"{way}_scale_inv"] = None
            continue
        source = values if way == "rowwise" else values.t()
        data, scale_inv = quantize_blocks(source, quantizer)
        if quantizer.block_scaling_dim == 1:
            scale_inv = scale_inv.t()
        if compact and way == "columnwise":  # as it came, to be gathered
            data = data.t()
            fields["columnwise_data"] = data.reshape(tensor.shape).contiguous()
        elif way == "columnwise":
            shape = (tensor.shape[-1], *tensor.shape[:-1])
            fields["columnwise_data"] = data.reshape(shape).contiguous()
        else:
            fields["rowwise_data"] = data.reshape(tensor.shape)
        if compact:
            fields[f"{way}_scale_inv"] = (
                scale_inv.t().contiguous() if way == "rowwise" else scale_inv.contiguous()
            )
        else:
            padding = -scale_inv.shape[1] % 4
            fields[f"{way}_scale_inv"] = F.pad(scale_inv, (0, padding)).contiguous()
    if output is not None:
        for name, value in fields.items():
            if value is not None:
                setattr(output, f"_{name}", value)
        return output
    fields |= dict(
        fp8_dtype=quantizer.dtype,
        quantizer=quantizer,
        is_2D_scaled=quantizer.block_scaling_dim == 2,
    )
    module = sys.modules[type(quantizer).__module__]
    formats = getattr(module, "Float8BlockScaleTensorFormat", None)
    if formats is not None:  # of older releases
        fields["data_format"] = formats.COMPACT if compact else formats.GEMM_READY
    storage = _storage(quantizer, "Float8BlockwiseQTensor")
    if quantizer.internal:
        if storage.__name__.endswith("Storage"):
            fields["fake_dtype"] = tensor.dtype
        return storage(**fields)
    public = module.Float8BlockwiseQTensor
    return public(shape=tensor.shape, dtype=tensor.dtype, requires_grad=False, **fields)


def quantize_blocks(source: torch.Tensor, quantizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes [rows, columns] and inverse scales of the blocks of 128 along the columns."""
    rows, columns = source.shape
    height = BLOCK if quantizer.block_scaling_dim == 2 else 1
    padded = F.pad(source, (0, -columns % BLOCK, 0, -rows % height))
    tiles = padded.reshape(padded.shape[0] // height, height, -1, BLOCK)
    scale = _scales(tiles.abs().amax((1, 3)), quantizer)
    scaled = (tiles * scale[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
    return _cast(scaled, quantizer.dtype), 1 / scale


def _operand_of_blocks(x: Any, rowwise: bool, dtype: torch.dtype) -> torch.Tensor:
    way = "rowwise" if rowwise else "columnwise"
    data, scale_inv = getattr(x, f"_{way}_data"), getattr(x, f"_{way}_scale_inv")
    assert data is not None, f"an FP8 product reads {way} data that was not made"
    compact = getattr(getattr(x, "_data_format", None), "name", "") == "COMPACT"
    assert not compact, "an FP8 product reads data in the form for gathering"
    data = data.reshape(-1, data.shape[-1]) if rowwise else data.reshape(data.shape[0], -1)
    rows, columns = data.shape
    wide = -(-columns // BLOCK)
    if x._is_2D_scaled:
        scale = scale_inv[: -(-rows // BLOCK), :wide].repeat_interleave(BLOCK, 0)[:rows]
    else:
        scale = scale_inv[:wide, :rows].t()
    scale = scale.repeat_interleave(BLOCK, 1)[:, :columns]
    values = data.view(dtype).float() * scale
    return values if rowwise else values.t()
