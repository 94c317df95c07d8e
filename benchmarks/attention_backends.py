"""Attention backends over visual and text rows, against causal self-attention and flex_attention.

    python -m benchmarks.attention_backends                 # CPU, small
    python -m benchmarks.attention_backends --device gpu    # the real layers' sizes
    python -m benchmarks.attention_backends --device gpu --tune   # times the kernel's block sizes

One layer's attention of one sample, V visual rows and then T text rows, forward and forward plus
backward. The peers, and what is done for each to be at its best, are in `attention_peers`.

A ratio is the peer's time over the backend's, in the same run: above 1 the backend is faster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dattn_mcore.parallel import entry

entry.prepare_imports("gpu")  # Megatron-Core's import dies of a broken package

from benchmarks import attention_peers
from benchmarks.attention_peers import random_rows
from benchmarks.measure import seconds_in_turn
from benchmarks.results import add_arguments, hand_over, markdown_table, number_ticks
from dattn_mcore.errors import ConfigError
from dattn_mcore.layers.attention import (
    BACKENDS,
    AttentionInputs,
    AttentionOptions,
    Backend,
    Rotary,
    choose_backend,
)
from dattn_mcore.layers.attention.rotary import rotary_angles
from dattn_mcore.layers.attention.triton_backend import TritonBackend
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
        self.rows = [random_rows(device, self.dtype, n, h, dim) for n, h in sizes]
        self.d_out = torch.randn(text, heads, dim, device=device, dtype=self.dtype)
        frequencies = 10_000.0 ** -(torch.arange(0, dim, 2, device=device) / dim)
        self.rotary = Rotary(
            text=rotary_angles(self.params.text_positions, frequencies),
            visual=torch.zeros(visual, 1, 1, dim, device=device),
        )

    def backend(self, backend: Backend) -> tuple[Step, Step]:
        """Forward, and forward with backward, of a backend."""
        names = ("q", "k_text", "v_text", "k_visual", "v_visual")
        inputs = AttentionInputs(
            **dict(zip(names, self.rows, strict=True)),
            q_visual=None,
            rotary=self.rotary,
            params=self.params,
        )

        def forward() -> torch.Tensor:
            return backend.attend(inputs, self.options)[0]

        return self._steps(forward, self.rows, self.d_out)

    def causal(self) -> tuple[Step, Step]:
        """The baseline's attention over all rows."""
        layer, rows = self.layer, self.visual + self.text
        forward, inputs = attention_peers.causal(
            heads=layer.heads,
            groups=layer.groups,
            rows=rows,
            options=self.options,
            head_dim=layer.head_dim,
            device=self.device,
            dtype=self.dtype,
        )
        return self._steps(forward, inputs, torch.randn_like(inputs[0]))

    def flex(self, autotune: bool) -> tuple[Step, Step]:
        """flex_attention of text rows over the rows that they see."""
        layer = self.layer
        forward, inputs = attention_peers.flex(
            heads=layer.heads,
            groups=layer.groups,
            visual=self.visual,
            text=self.text,
            options=self.options,
            head_dim=layer.head_dim,
            device=self.device,
            dtype=self.dtype,
            autotune=autotune,
        )
        return self._steps(forward, inputs, torch.randn_like(inputs[0]))

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
            choose_backend(name, case.options, case.device.type, case.dtype, case.layer.head_dim)
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
    steps = {name: case.backend(BACKENDS[name]) for name in backends_for(case)}
    if "causal" in args.peers:
        steps["causal"] = case.causal()
    if "flex" in args.peers:
        steps["flex"] = case.flex(args.autotune_flex)
    rows = []
    for index, direction in enumerate(("forward", "forward and backward")):
        functions = {name: pair[index] for name, pair in steps.items()}
        if device.type == "cpu" and index:
            functions.pop("flex", None)
        seconds = seconds_in_turn(functions, args.repeats, device)
        for name in steps:
            if name not in PEERS and name in seconds:
                rows.append(
                    {
                        "layer": layer,
                        "visual": visual,
                        "text": text,
                        "backend": name,
                        "direction": direction,
                        "seconds": seconds[name],
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
            pair = case.backend(TritonBackend(tuning=Tuning(**{kernel: blocks})))
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
            row["layer"],
            row["visual"],
            row["text"],
            row["direction"],
            row["backend"],
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
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument(
        "--autotune-flex", action="store_true", help="let flex_attention time its block sizes"
    )
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
        text = max(row["text"] for row in rows)
        lines: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
        for row in rows:
            if row["direction"] == "forward" and row["text"] == text:
                for peer in filter(row.get, PEERS):
                    points = lines.setdefault((row["layer"], row["backend"], peer), [])
                    points.append((row["visual"], row[peer] / row["seconds"]))
        models = list(dict.fromkeys(key[:2] for key in lines))
        for (layer, backend, peer), points in lines.items():
            style = {"color": f"C{models.index((layer, backend))}"}
            style["linestyle"] = "-" if peer == PEERS[0] else "--"
            label = f"{peer} / {layer}, {backend}"
            axes.plot(*zip(*points, strict=True), marker="o", label=label, **style)
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set(xlabel="visual rows", ylabel="time of the peer, the backend's = 1")
        axes.set(xscale="log", yscale="log", title=f"forward, {text} text rows, {args.device}")
        number_ticks(axes, sorted({row["visual"] for row in rows}))
        axes.legend(fontsize="small")

    hand_over("attention-backends", args, _table(rows), rows, draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
