"""Attention backends over visual and text rows, against causal self-attention and flex_attention.

    python -m benchmarks.attention_backends                 # CPU, small
    python -m benchmarks.attention_backends --device gpu    # the real layers' sizes
    python -m benchmarks.attention_backends --device gpu --tune   # times the kernel's block sizes

One layer's attention of one sample, V visual rows and then T text rows, forward and forward plus
backward. Peers, whose tensors are given rotated and in their own layout, at no cost to them:

- `causal`: what the baseline runs, causal self-attention over all V + T rows, by flash-attn where
  it is installed, else by PyTorch's SDPA (which has no soft-cap: it is then run without).
- `flex`: PyTorch's flex_attention, compiled, text rows over all rows that they see, in one call.
  It has one query per row, so it is spared the second, rotated one. It has no backward on a CPU.

A ratio is the peer's time over the backend's, in the same run: above 1 the backend is faster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.measure import seconds_in_turn
from benchmarks.results import add_arguments, hand_over, markdown_table
from dattn_mcore.errors import ConfigError
from dattn_mcore.layers.attention import BACKENDS, AttentionOptions, Rotary, choose_backend
from dattn_mcore.layers.attention.rotary import rotary_angles
from dattn_mcore.layers.attention.triton_tuning import Tuning, candidates
from dattn_mcore.layers.layout import build_seq_params
from dattn_mcore.parallel import platform


@dataclass(frozen=True)
class Layer:
    """Attention of one layer."""

    heads: int
    groups: int
    head_dim: int
    softcap: float | None = None


LAYERS = {
    "gpu": {"mistral": Layer(32, 8, 128), "gemma2": Layer(16, 8, 256, 50.0)},
    "cpu": {"mistral": Layer(4, 1, 128), "gemma2": Layer(2, 1, 256, 50.0)},
}
VISUAL = {"gpu": [576, 2880, 8192, 16384, 32768, 100_000], "cpu": [576, 1152, 2304]}
TEXT = {"gpu": [64, 512, 4096], "cpu": [64, 256]}
PEERS = ("causal", "flex")
Step = Callable[[], object]


class Case:
    """Tensors of one layer and size, and the functions that are timed."""

    def __init__(self, layer: Layer, visual: int, text: int, device: torch.device):
        self.layer, self.visual, self.text, self.device = layer, visual, text, device
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        torch.manual_seed(0)
        heads, groups, dim = layer.heads, layer.groups, layer.head_dim
        self.options = AttentionOptions(scale=dim**-0.5, softcap=layer.softcap)
        layout = ((True, visual), (False, text))
        self.params = build_seq_params((layout,), t2v_position="none", device=device)
        sizes = [(text, heads), *[(text, groups)] * 2, *[(visual, groups)] * 2]
        self.rows = [self._random(n, h, dim) for n, h in sizes]
        self.d_out = self._random(text, heads, dim).detach()
        frequencies = 10_000.0 ** -(torch.arange(0, dim, 2, device=device) / dim)
        self.rotary = Rotary(
            text=rotary_angles(self.params.text_positions, frequencies),
            visual=torch.zeros(visual, 1, 1, dim, device=device),
        )

    def _random(self, *shape: int) -> torch.Tensor:
        rows = torch.randn(shape, device=self.device, dtype=self.dtype)
        return rows.requires_grad_()

    def backend(self, name: str, **extra: Any) -> tuple[Step, Step]:
        """Forward, and forward with backward, of a backend."""

        def forward() -> torch.Tensor:
            inputs = (*self.rows, None, self.rotary, self.params, self.options)
            return BACKENDS[name](*inputs, **extra)[0]

        return self._steps(forward, self.rows, self.d_out)

    def causal(self) -> tuple[Step, Step]:
        """The baseline's attention over all rows, by flash-attn or else by SDPA."""
        layer, n = self.layer, self.visual + self.text
        try:
            choose_backend("flash", self.options, self.device.type, self.dtype, layer.head_dim)
        except ConfigError:
            shapes = [(1, h, n, layer.head_dim) for h in (layer.heads, layer.groups, layer.groups)]
            q, k, v = (self._random(*shape) for shape in shapes)

            def forward() -> torch.Tensor:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            from flash_attn import flash_attn_func

            shapes = [(1, n, h, layer.head_dim) for h in (layer.heads, layer.groups, layer.groups)]
            q, k, v = (self._random(*shape) for shape in shapes)

            def forward() -> torch.Tensor:
                return flash_attn_func(q, k, v, causal=True, softcap=layer.softcap or 0.0)

        return self._steps(forward, [q, k, v], torch.randn_like(q))

    def flex(self) -> tuple[Step, Step]:
        """Text rows over the rows that they see, in one compiled call."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        layer, visual, n = self.layer, self.visual, self.visual + self.text
        shapes = [
            (1, layer.heads, self.text, layer.head_dim),
            *[(1, layer.groups, n, layer.head_dim)] * 2,
        ]
        q, k, v = (self._random(*shape) for shape in shapes)

        def sees(b: Any, h: Any, query: Any, key: Any) -> Any:
            return key <= query + visual

        def capped(score: torch.Tensor, b: Any, h: Any, query: Any, key: Any) -> torch.Tensor:
            return layer.softcap * torch.tanh(score / layer.softcap)

        if self.device.type == "cpu":  # refused where a backward pass could follow
            q, k, v = q.detach(), k.detach(), v.detach()
        mask = create_block_mask(sees, None, None, self.text, n, device=str(self.device))
        torch.compiler.reset()  # beyond a few shapes of one function it would run uncompiled
        compiled = torch.compile(flex_attention, dynamic=False)
        modification = capped if layer.softcap else None

        def forward() -> torch.Tensor:
            return compiled(
                q, k, v, score_mod=modification, block_mask=mask, enable_gqa=layer.heads > 1
            )

        return self._steps(forward, [q, k, v], torch.randn_like(q))

    def _steps(
        self, forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor], d_out: torch.Tensor
    ) -> tuple[Step, Step]:
        def alone() -> None:
            with torch.no_grad():
                forward()

        return alone, lambda: torch.autograd.grad(forward(), leaves, d_out)


def backends_for(case: Case) -> list[str]:
    """The project's backends that can compute this, but for the oracle where another can."""
    able = []
    for name in ("flash", "triton", "sdpa"):
        try:
            choose_backend(*(name, case.options, case.device.type, case.dtype, case.layer.head_dim))
        except ConfigError:
            continue
        # Interpreted kernels take seconds by nature; their time says nothing.
        if name != "triton" or case.device.type != "cpu":
            able.append(name)
    return able or ["reference"]


def measure(layer: str, visual: int, text: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table for one size, one per backend and direction."""
    device = platform.current_device()
    case = Case(LAYERS[args.device][layer], visual, text, device)
    steps = {name: case.backend(name) for name in backends_for(case)}
    steps |= {"causal": case.causal(), "flex": case.flex()}
    rows = []
    for index, direction in enumerate(("forward", "forward and backward")):
        functions = {name: pair[index] for name, pair in steps.items()}
        if device.type == "cpu" and index:
            del functions["flex"]
        seconds = seconds_in_turn(functions, args.repeats, device)
        for name in steps:
            if name not in PEERS and name in seconds:
                rows.append(
                    {
                        **{"layer": layer, "visual": visual, "text": text, "backend": name},
                        **{"direction": direction, "seconds": seconds[name]},
                        **{peer: seconds.get(peer) for peer in PEERS},
                    }
                )
    return rows


def tune(layer: str, visual: int, text: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times the joint kernel with every candidate of one of its kernels, the others as chosen."""
    from triton.runtime.errors import OutOfResources

    device = platform.current_device()
    case = Case(LAYERS[args.device][layer], visual, text, device)
    rows = []
    for kernel in ("forward", "query", "key"):
        for blocks in candidates(kernel, case.layer.head_dim, case.dtype, device):
            pair = case.backend("triton", tuning=Tuning(**{kernel: blocks}))
            try:
                seconds = seconds_in_turn({"step": pair[kernel != "forward"]}, args.repeats, device)
            except OutOfResources:
                continue
            size = f"{blocks.queries} x {blocks.keys}, {blocks.warps} warps, {blocks.stages} stages"
            at = {"layer": layer, "visual": visual, "text": text, "kernel": kernel}
            rows.append({**at, "blocks": size, "seconds": seconds.get("step")})
    return rows


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f}"


def _table(rows: list[dict[str, Any]]) -> str:
    def ratio(row: dict[str, Any], peer: str) -> str:
        return f"{row[peer] / row['seconds']:.2f}" if row[peer] else ""

    header = ("layer", "V", "T", "direction", "backend", "ms", *(f"{p}, ms" for p in PEERS))
    cells = (
        [
            *(row["layer"], row["visual"], row["text"], row["direction"], row["backend"]),
            *(_milliseconds(row[key]) for key in ("seconds", *PEERS)),
            *(ratio(row, peer) for peer in PEERS),
        ]
        for row in rows
    )
    return markdown_table((*header, *(f"{peer} / backend" for peer in PEERS)), cells)


def main(arguments: list[str] | None = None) -> int:
    """Measures every size; see the file's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--visual", type=int, nargs="+", help="visual rows")
    parser.add_argument("--text", type=int, nargs="+", help="text rows")
    parser.add_argument("--layers", nargs="+", default=["mistral", "gemma2"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tune", action="store_true", help="time the Triton kernel's block sizes")
    args = parser.parse_args(arguments)
    platform.install(args.device)
    sizes = [
        (layer, visual, text)
        for layer in args.layers
        for visual in args.visual or VISUAL[args.device]
        for text in args.text or TEXT[args.device]
    ]
    if args.tune:
        rows = [row for size in sizes for row in tune(*size, args)]
        header = ("layer", "visual", "text", "kernel", "blocks", "seconds")
        sys.stdout.write(markdown_table(header, ([row[key] for key in header] for row in rows)))
        return 0
    rows = [row for size in sizes for row in measure(*size, args)]

    def draw(axes: Any) -> None:
        lines: dict[str, list[tuple[int, float]]] = {}
        text = max(row["text"] for row in rows)
        for row in rows:
            if row["direction"] == "forward" and row["text"] == text and row["causal"]:
                label = f"{row['layer']}, {row['backend']}"
                lines.setdefault(label, []).append((row["visual"], row["causal"] / row["seconds"]))
        for label, points in lines.items():
            axes.plot(*zip(*points, strict=True), "o-", label=label)
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set(xlabel="visual rows", ylabel="time of causal attention, the backend's = 1")
        axes.set(xscale="log", yscale="log", title=f"forward, {text} text rows, {args.device}")
        axes.legend()

    hand_over("attention-backends", args, _table(rows), rows, draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
