"""The `triton` backend: every mode on the project's own joint kernel, forward and backward.

The kernel asks with a query row two sets of keys under one softmax: visual keys, some visible
ranges a row, with the query as it is; text keys, causally, with the query rotated. Text keys are
rotated once per call by a kernel of their own, for all query tiles. Nothing rotated is kept for the
backward pass.

Visual rows that attend to visual rows before them, or all rows in reading order, are the same
kernel with these rows in the place of the text rows.

Triton is imported (with `triton_launch`) at the first call: where it is missing, all else works.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from dattn_mcore.errors import first_line
from dattn_mcore.layers.attention.inputs import AttentionInputs
from dattn_mcore.layers.attention.modes import (
    Causal,
    InBlocks,
    InChunks,
    KeySet,
    Softmax,
    attend,
)
from dattn_mcore.layers.attention.options import AttentionOptions
from dattn_mcore.layers.attention.triton_schedule import Keys, Schedule, Setting
from dattn_mcore.layers.attention.triton_tuning import Tuning
from dattn_mcore.layers.blocks import Block
from dattn_mcore.layers.layout import DecomposedSeqParams
from dattn_mcore.parallel.packages import ABSENT, import_problem
from dattn_mcore.parallel.platform import current_device

HEAD_DIMS = (16, 32, 64, 128, 256)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class TritonBackend:
    """See the module.

    Attributes:
        tuning: block sizes that the caller fixes.
    """

    tuning: Tuning = Tuning()
    name: str = "triton"
    needs_gpu: bool = True

    def refuses(
        self, options: AttentionOptions, device_type: str, dtype: torch.dtype, head_dim: int
    ) -> str | None:
        """See `Backend`."""
        if problem := import_problem("triton"):
            return f"the package triton {problem}" + " (pip install triton)" * (problem == ABSENT)
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "it needs a GPU (TRITON_INTERPRET=1 in the environment interprets it, for tests)"
        if head_dim not in HEAD_DIMS:
            return f"head size {head_dim} is none of {', '.join(map(str, HEAD_DIMS))}"
        if dtype not in _DTYPES:
            return f"it computes bf16, fp16 and fp32, not {dtype}"
        if options.window_skips_positions:
            return "it has no sliding window between text and visual rows in this mixed mode"
        device = current_device()
        # A dry run chooses for a GPU that this machine need not have.
        return None if device.type == "cpu" else launch_problem(device)

    def describe(self, head_dim: int) -> str:
        """See `Backend`."""
        return "the joint Triton kernel computes this model"

    def attend(
        self, inputs: AttentionInputs, options: AttentionOptions
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend`."""
        return attend(
            inputs, options, lambda softmax: _compute(softmax, inputs, options, self.tuning)
        )

    def part(
        self,
        key_set: KeySet,
        params: DecomposedSeqParams,
        options: AttentionOptions,
        device: torch.device,
    ) -> TritonPart:
        """See `Backend`."""
        key = ("triton part", *key_set.key, getattr(key_set.sees, "window", None))
        if key not in params.cache:
            params.cache[key] = _part_schedule(key_set, params, device)
        schedule = params.cache[key]
        setting = Setting(
            scale=options.scale,
            softcap=options.softcap,
            debiased=True,  # keys are given as the queries meet them
            has_visual=bool(schedule.blocks),
            has_text=False,
            tuning=self.tuning,
        )
        return TritonPart(schedule, setting)


BACKEND = TritonBackend()


@functools.cache
def launch_problem(device: torch.device) -> str | None:
    """Why Triton cannot launch a kernel on a device; None where it can. Tries it once.

    Args:
        device: a GPU.
    """
    try:
        # Imported here: it needs Triton.
        from dattn_mcore.layers.attention.triton_trial import launch

        launch(device)
    except Exception as error:  # noqa: BLE001 (of a compiler, a driver, a library)
        return f"it cannot launch a kernel on this machine: {_why_no_launch(error)}"
    return None


def _why_no_launch(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):  # its text is a command of many lines
        header = Path(sysconfig.get_paths()["include"]) / "Python.h"
        if not header.is_file():
            return f"the C compiler finds no {header}; install Python's headers (python3-dev)"
        return f"the C compiler ends with status {error.returncode}; its own words stand above"
    if "C compiler" in str(error):
        return f"{first_line(error)} Install gcc, or name a compiler in CC"
    return first_line(error)


def _compute(
    softmax: Softmax, inputs: AttentionInputs, options: AttentionOptions, tuning: Tuning
) -> torch.Tensor:
    """Output [rows, heads, head_dim] of a softmax, zero on padding rows."""
    rows = softmax.queries
    setting = setting_of(softmax, options, tuning)
    if not setting.has_visual and not setting.has_text:
        return torch.zeros_like(inputs.queries(rows))
    k_visual = inputs.keys("visual")
    if setting.has_visual and not setting.debiased:
        k_visual = inputs.rotated_keys("visual")
    return joint(
        q=inputs.queries(rows),
        k_text=inputs.keys(rows),
        v_text=inputs.values(rows),
        k_visual=k_visual,
        v_visual=inputs.values("visual"),
        angles=inputs.angles(rows),
        factor=inputs.query_factor(rows),
        schedule=schedule_of(softmax, inputs.params, inputs.q.device),
        setting=setting,
    )[0]


def _part_schedule(key_set: KeySet, params: DecomposedSeqParams, device: torch.device) -> Schedule:
    """Who sees what in a part: all of it as visible ranges, of which a row may have any."""
    sees = key_set.sees
    if isinstance(sees, InChunks):
        lengths = tuple(chunk.rows for chunk in sees.chunks)
        return Schedule(Causal(lengths, None), sees.blocks(), device)
    assert isinstance(sees, InBlocks) and params.context is not None
    return Schedule(Causal(params.context.text_lengths, None), sees.blocks, device)


@dataclass(frozen=True)
class TritonPart:
    """See `Part`: the joint kernel with its visual set of keys alone.

    Attributes:
        schedule: who sees what.
        setting: what is computed.
    """

    schedule: Schedule
    setting: Setting

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """See `Part`."""
        from dattn_mcore.layers.attention.triton_launch import forward

        if not self.setting.has_visual:
            nothing = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
            return torch.zeros_like(q), nothing, None
        out, lse = forward(q, Keys(k, v, k, v), _no_tables(q), self.schedule, self.setting)
        return out, lse, None

    def backward(
        self,
        grad: torch.Tensor,
        *,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        state: None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Part`."""
        from dattn_mcore.layers.attention.triton_gradients import backward

        if not self.setting.has_visual:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        d_q, _, _, d_k, d_v = backward(
            grad, q, Keys(k, v, k, v), _no_tables(q), out, lse, self.schedule, self.setting
        )
        return d_q, d_k, d_v


def _no_tables(q: torch.Tensor) -> torch.Tensor:
    """Rotation tables where nothing is rotated."""
    return q.new_empty((2, 0, q.shape[-1] // 2), dtype=torch.float32)


def setting_of(softmax: Softmax, options: AttentionOptions, tuning: Tuning) -> Setting:
    """How the kernel computes a softmax."""
    seen = [key_set.sees for key_set in softmax.key_sets]
    return Setting(
        scale=options.scale,
        softcap=options.softcap,
        debiased=options.debiased,
        has_visual=any(isinstance(sees, InBlocks) and bool(sees.blocks) for sees in seen),
        has_text=any(isinstance(sees, Causal) for sees in seen),
        tuning=tuning,
    )


def schedule_of(softmax: Softmax, params: DecomposedSeqParams, device: torch.device) -> Schedule:
    """Who sees what in a softmax; kept with the pack."""
    causal = Causal(softmax.lengths, None)
    blocks: tuple[Block, ...] = ()
    for key_set in softmax.key_sets:
        if isinstance(key_set.sees, Causal):
            causal = key_set.sees
        elif isinstance(key_set.sees, InBlocks):
            blocks = key_set.sees.blocks
    key = ("triton", *(key_set.key for key_set in softmax.key_sets), causal.window)
    if key not in params.cache:
        params.cache[key] = Schedule(causal, blocks, device)
    return params.cache[key]


def joint(
    *,
    q: torch.Tensor,
    k_text: torch.Tensor,
    v_text: torch.Tensor,
    k_visual: torch.Tensor,
    v_visual: torch.Tensor,
    angles: torch.Tensor,
    schedule: Schedule,
    setting: Setting,
    factor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of the rows of a schedule; the latter carries no gradient.

    Args:
        q: [rows, heads, head_dim], not rotated.
        k_text, v_text: [rows, groups, head_dim], not rotated.
        k_visual, v_visual: [V, groups, head_dim].
        angles: [rows, 1, 1, head_dim] of q and k_text.
        schedule: who sees what.
        setting: what is computed.
        factor: multiplies q where it is rotated, [rows, 1, 1, 1]; None for 1.
    """
    from dattn_mcore.layers.attention.triton_launch import rotation_tables

    key_tables = rotation_tables(angles)
    query_tables = key_tables if factor is None else rotation_tables(angles, factor)
    return _Joint.apply(
        q, k_text, v_text, k_visual, v_visual, query_tables, key_tables, schedule, setting
    )


class _Joint(torch.autograd.Function):
    """The kernels as one differentiable function."""

    @staticmethod
    def forward(
        ctx, q, k_text, v_text, k_visual, v_visual, query_tables, key_tables, schedule, setting
    ):
        from dattn_mcore.layers.attention.triton_launch import forward, rotated

        q, k_text, v_text, k_visual, v_visual = (
            x if x.stride(-1) == 1 else x.contiguous()
            for x in (q, k_text, v_text, k_visual, v_visual)
        )
        k_rotated = rotated(k_text, key_tables) if setting.has_text else k_text
        keys = Keys(k_rotated, v_text, k_visual, v_visual)
        out, lse = forward(q, keys, query_tables, schedule, setting)
        ctx.save_for_backward(
            q, k_text, v_text, k_visual, v_visual, query_tables, key_tables, out, lse
        )
        ctx.schedule, ctx.setting = schedule, setting
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, d_out, _):
        from dattn_mcore.layers.attention.triton_gradients import backward
        from dattn_mcore.layers.attention.triton_launch import rotated

        q, k_text, v_text, k_visual, v_visual, tables, key_tables, out, lse = ctx.saved_tensors
        k_rotated = rotated(k_text, key_tables) if ctx.setting.has_text else k_text
        keys = Keys(k_rotated, v_text, k_visual, v_visual)
        d_q, d_rotated, *others = backward(
            d_out, q, keys, tables, out, lse, ctx.schedule, ctx.setting
        )
        d_text = None if d_rotated is None else rotated(d_rotated, key_tables, -1.0)
        return d_q, d_text, *others, None, None, None, None
