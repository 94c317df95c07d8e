"""Matrix products of the compiled module, in PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from tests.te.casts import DTYPES, is_quantized, operand, result_of


def generic_gemm(
    A: Any,  # noqa: N803 (the names are Transformer Engine's)
    transA: bool,  # noqa: N803
    B: Any,  # noqa: N803
    transB: bool,  # noqa: N803
    D: torch.Tensor | None,  # noqa: N803
    quantizer: Any,
    output_dtype: Any,
    bias: torch.Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: torch.Tensor | None,
    grad: bool,
    workspace: torch.Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> list[Any]:
    """`D = op(B) @ op(A)` of matrices [rows, columns]; leading dimensions are flattened.

    Args:
        A, B: operands.
        transA, transB: which are transposed.
        D: written to; None: a new tensor.
        quantizer: of the output, which is then FP8.
        output_dtype: of a new tensor; None: that of the operands.
        bias: added to each row; with `grad`, what is asked for is its gradient.
        bias_type, gelu, gelu_in, workspace, workspace_size, use_split_accumulator: unused here.
        grad: it is a product of backward.
        accumulate: `D` is added to.
        comm_overlap, comm_type, extra_output, bulk_overlap: exchanges beside the product; none.
        alpha: factor of the product.
        beta: factor of what `D` held.

    Returns:
        `D`, the bias's gradient, nothing, nothing.
    """
    assert not gelu and comm_overlap is None and extra_output is None
    assert is_quantized(A) == is_quantized(B), "one operand in FP8 and one not"
    a = operand(A, rowwise=transA)
    b = operand(B, rowwise=not transB)
    if is_quantized(A):
        _check_sizes(a, b, transA, transB)
    product = (b.t() if transB else b) @ (a.t() if transA else a)
    product = product * alpha if alpha != 1.0 else product
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = b.sum(0).to(DTYPES[bias_type])
    elif bias is not None and bias.numel():
        product = product + bias.float()
    dtype = D.dtype if D is not None else None
    if dtype is None:
        dtype = DTYPES[output_dtype] if output_dtype is not None else B.dtype
    if D is None:
        shape = product.shape if transB else (*B.size()[:-1], product.shape[-1])
        out = result_of(product.view(shape), dtype, quantizer, None)
    else:
        assert quantizer is None
        out = D
        if accumulate:
            D.add_(product.view(D.shape))
        else:
            D.copy_(product.view(D.shape))
    return [out, bias_gradient, None, None]


def _check_sizes(a: torch.Tensor, b: torch.Tensor, trans_a: bool, trans_b: bool) -> None:
    """What cuBLAS asks of FP8 products: the summed dimension and the output's are multiples of 16.

    Source: cuBLAS, "8-bit Floating Point Data Types (FP8) Usage": all dimensions of the matrices must
    be multiples of 16 bytes.
    """
    summed = b.shape[0] if trans_b else b.shape[1]
    inner, outer = (a.shape[0] if trans_a else a.shape[1]), (b.shape[1] if trans_b else b.shape[0])
    for name, size, multiple in (("summed", summed, 16), ("column", inner, 16), ("row", outer, 8)):
        assert size % multiple == 0, (
            f"FP8 product: {name} dimension {size} is no multiple of {multiple}"
        )
