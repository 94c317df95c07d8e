"""The attention that the project's backends are measured against, each at its best.

Tensors are given rotated and in the peer's own layout, at no cost to it.

- `causal`: what the baseline runs, causal self-attention over all V + T rows: by flash-attn (3 on
  Hopper where it is installed, else 2), or else by PyTorch's SDPA, on a GPU by whichever of its
  kernels is fastest there. SDPA has no soft-cap: it is then run without.
- `flex`: PyTorch's flex_attention, compiled, text rows over all rows that they see, in one call.
  It has one query per row, so it is spared the second, rotated one. It has no backward on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import seconds_in_turn
from dattn_mcore.layers.attention import BACKENDS, AttentionOptions
from dattn_mcore.layers.attention.flash import flash_version

Forward = Callable[[], torch.Tensor]
# What the fastest of is taken on a GPU.
_SDPA = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)


def random_rows(device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Normally distributed rows that take a gradient."""
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_()


def causal(
    *,
    heads: int,
    groups: int,
    rows: int,
    options: AttentionOptions,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Forward, list[torch.Tensor]]:
    """Forward pass of causal self-attention, and its inputs."""
    counts = (heads, groups, groups)
    if BACKENDS["flash"].refuses(options, device.type, dtype, head_dim) is None:
        q, k, v = (random_rows(device, dtype, 1, rows, n, head_dim) for n in counts)
        return _flash(q, k, v, options.softcap or 0.0), [q, k, v]
    q, k, v = (random_rows(device, dtype, 1, n, rows, head_dim) for n in counts)

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return (forward if device.type == "cpu" else _fastest(forward, [q, k, v])), [q, k, v]


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softcap: float) -> Forward:
    if flash_version(q.shape[-1]) == 3:
        from flash_attn_interface import flash_attn_func
    else:
        from flash_attn import flash_attn_func

    def forward() -> torch.Tensor:
        out = flash_attn_func(q, k, v, causal=True, softcap=softcap)
        return out[0] if isinstance(out, tuple) else out  # the first releases of 3 add the LSE

    return forward


def _fastest(forward: Forward, inputs: list[torch.Tensor]) -> Forward:
    """The call by that kernel of SDPA which takes least time forward and backward."""
    d_out = torch.randn_like(inputs[0])
    able: dict[str, Forward] = {}
    for kernel in _SDPA:

        def call(kernel: SDPBackend = kernel) -> torch.Tensor:
            with sdpa_kernel(kernel):
                return forward()

        try:
            call()
        except RuntimeError:  # it cannot compute this here
            continue
        able[kernel.name] = call

    def step(call: Forward) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(), inputs, d_out)

    seconds = seconds_in_turn({name: step(call) for name, call in able.items()}, 3, d_out.device)
    return able[min(seconds, key=seconds.__getitem__)] if seconds else forward


def flex(
    *,
    heads: int,
    groups: int,
    visual: int,
    text: int,
    options: AttentionOptions,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    autotune: bool,
) -> tuple[Forward, list[torch.Tensor]]:
    """Forward pass of text rows over the rows that they see, in one compiled call; its inputs."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows = visual + text
    shapes = [(1, heads, text, head_dim), *[(1, groups, rows, head_dim)] * 2]
    q, k, v = (random_rows(device, dtype, *shape) for shape in shapes)

    def sees(b: Any, h: Any, query: Any, key: Any) -> Any:
        return key <= query + visual

    def capped(score: torch.Tensor, b: Any, h: Any, query: Any, key: Any) -> torch.Tensor:
        assert options.softcap is not None
        return options.softcap * torch.tanh(score / options.softcap)

    if device.type == "cpu":  # refused where a backward pass could follow
        q, k, v = q.detach(), k.detach(), v.detach()
    mask = create_block_mask(sees, None, None, text, rows, device=str(device))
    torch.compiler.reset()  # beyond a few shapes of one function it would run uncompiled
    choices = {"max_autotune": True} if autotune else None
    compiled: Any = torch.compile(flex_attention, dynamic=False, options=choices)
    modification = capped if options.softcap else None

    def forward() -> torch.Tensor:
        return compiled(q, k, v, score_mod=modification, block_mask=mask, enable_gqa=heads > 1)

    return forward, [q, k, v]
