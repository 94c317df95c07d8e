"""FLOPs of D-Attn's decoder step, counted by PyTorch, against the closed form in plan/flops.py.

    python -m benchmarks.count_flops                   # Mistral 7B's and Gemma 2 9B's real layers

Layers run on PyTorch's meta device: shapes are real, nothing is computed, so any machine can count
any size. Counted is forward and backward of the stack of layers (`--layers` of them) by
`torch.utils.flop_counter`, which sees every matrix product; flash kernels are counted by the pairs
of query and key that they must compute. Exit status 1: more than 3 % apart.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dattn_mcore.parallel import entry

entry.prepare_imports("gpu")  # Megatron-Core's import dies of a broken package

from benchmarks.results import ROOT, add_arguments, hand_over, markdown_table, number_ticks
from dattn_mcore.config.load import load_config
from dattn_mcore.config.schema import Config
from dattn_mcore.layers.layout import build_seq_params
from dattn_mcore.models.dattn import DattnModel
from dattn_mcore.parallel.groups import single_process
from dattn_mcore.plan.flops import decoder_work
from dattn_mcore.plan.rows import rows_of
from dattn_mcore.training.model import build_from_config
from dattn_mcore.types import Layout

BOUND = 0.03
# The soft-cap of Gemma 2 needs a backend whose products the counter sees.
MODELS = {"Mistral 7B": ("mistral_7b_v03", "sdpa"), "Gemma 2 9B": ("gemma2_9b", "reference")}
MODES: dict[str, list[str]] = {
    "D-Attn": [],
    "D-Attn, visual rows recomputed": ["train.recompute_visual_chunk=4096"],
    # Gemma's: `reference` computes the pairs that a window hides, so they are not counted.
    "baseline": ["attention.v2v=causal", "attention.t2v_position=rope"],
}
aten: Any = torch.ops.aten


def _pairs(query: Any, key: Any, causal: bool) -> int:
    batch, heads, rows, head_dim = query
    pairs = rows * (rows + 1) // 2 if causal else rows * key[2]
    return batch * heads * head_dim * pairs


def _forward(query: Any, key: Any, *rest: Any, **named: Any) -> int:
    return 4 * _pairs(query, key, _is_causal(rest, named))


def _backward(grad: Any, query: Any, key: Any, *rest: Any, **named: Any) -> int:
    return 10 * _pairs(query, key, _is_causal(rest, named))


def _is_causal(rest: Any, named: Any) -> bool:
    """The first flag of each of these operators; it is left out where it is False."""
    flags = [value for value in rest if isinstance(value, bool)]
    return flags[0] if flags else bool(named.get("is_causal"))


FLASH = {
    aten._scaled_dot_product_flash_attention: _forward,
    aten._scaled_dot_product_flash_attention_backward: _backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}


def counted_decoder_step(
    model: DattnModel,
    config: Config,
    layouts: Sequence[Layout],
    device: str,
    entered_learns: bool = True,
    images_of: Sequence[int] = (),
) -> int:
    """FLOPs of one forward and backward pass through the stack of layers, by PyTorch.

    Args:
        model: on the device.
        config: of the model.
        layouts: of the samples of one pack.
        device: name of it.
        entered_learns: what enters the layers needs a gradient.
        images_of: visual unit of each sample (`types.visual_units`); empty: each has its own.
    """
    params = build_seq_params(
        layouts,
        t2v_position=config.attention.t2v_position,
        device=device,
        images_of=images_of,
    )
    dtype = next(model.decoder.parameters()).dtype
    hidden = torch.zeros(
        params.num_visual + params.num_text,
        1,
        config.model.llm.hidden_size,
        dtype=dtype,
        device=device,
        requires_grad=entered_learns,
    )
    positions = torch.cat([params.visual_positions, params.text_positions])
    with FlopCounterMode(display=False, custom_mapping=FLASH) as counter:
        out = model.decoder(
            hidden_states=hidden * 1.0,
            attention_mask=None,
            rotary_pos_emb=model.angles(positions),
            packed_seq_params=params,
        )
        out.backward(torch.zeros_like(out))
    return counter.get_total_flops()


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; see the file's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--visual", type=int, nargs="+", default=[576, 2880, 8192, 32768])
    args = parser.parse_args(arguments)
    rows = []
    with single_process() as groups:
        for name, (file, backend) in MODELS.items():
            for mode, overrides in MODES.items():
                if (name, mode) == ("Gemma 2 9B", "baseline"):
                    continue
                config = load_config(
                    ROOT / "configs" / "models" / f"{file}.yaml",
                    [
                        f"model.llm.num_layers={args.layers}",
                        "train.precision=bf16",
                        f"attention.backend={backend}",
                        "model.vision.num_layers=1",
                        *overrides,
                    ],
                )
                (model,) = build_from_config(config, groups, torch.device("meta"), initialize=False)
                for visual in args.visual:
                    layouts = (((True, visual), (False, args.text)),)
                    counted = counted_decoder_step(model, config, layouts, "meta")
                    work = decoder_work(config, rows_of(config, layouts, args.text))
                    closed = sum(part.executed for part in work.values())
                    rows.append((name, mode, visual, counted, closed, counted / closed - 1))
    table = markdown_table(
        ("model", "mode", "visual rows", "counted TFLOP", "closed form", "apart"),
        (
            (name, mode, visual, f"{counted / 1e12:.3f}", f"{closed / 1e12:.3f}", f"{apart:+.2%}")
            for name, mode, visual, counted, closed, apart in rows
        ),
    )

    def draw(axes: Any) -> None:
        for name, mode in dict.fromkeys(row[:2] for row in rows):
            mine = [row for row in rows if row[:2] == (name, mode)]
            points = [row[2] for row in mine], [row[3] / 1e12 for row in mine]
            (line,) = axes.plot(*points, "o", label=f"{name}, {mode}")
            axes.plot(points[0], [row[4] / 1e12 for row in mine], color=line.get_color())
        axes.set(xlabel="visual rows", ylabel="TFLOP of a step", xscale="log", yscale="log")
        number_ticks(axes, args.visual)
        axes.set_title(f"{args.layers} layers: points counted, lines closed form")
        axes.legend(fontsize="small")

    keys = ("model", "mode", "visual", "counted", "closed_form", "apart")
    hand_over("flops", args, table, [dict(zip(keys, row, strict=True)) for row in rows], draw)
    return int(max(abs(row[-1]) for row in rows) > BOUND)


if __name__ == "__main__":
    sys.exit(main())
