"""What a training run can be asked for, and in what layouts: cases that hold every pair.

Each factor has named values, and each value the settings that it stands for; the first is the usual
one. `CASES` are the runs of `test_features_by_layout`, and docs/testing.md shows which of them
covers which feature in which layout.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from dattn_mcore.config.load import merge
from tests.distributed.small_models import (
    AIMV2,
    CLIP,
    GEMMA,
    GEMMA3,
    LLAMA,
    MINISTRAL3,
    OLMO2,
    QWEN2,
    QWEN3,
    SMOLLM3,
)
from tests.pairwise import Pair, pairs_of, pairwise

Settings = dict[str, dict[str, Any]]


def _parallel(**settings: Any) -> Settings:
    return {"parallel": settings}


def _train(**settings: Any) -> Settings:
    return {"train": settings}


def _attention(**settings: Any) -> Settings:
    return {"attention": settings}


def _data(**settings: Any) -> Settings:
    return {"data": settings}


LAYOUT: dict[str, dict[str, Settings]] = {
    "tensor": {"tp1": {}, "tp2": _parallel(tp=2), "tp2-sp": _parallel(tp=2, sp=True)},
    "pipeline": {
        "pp1": {},
        "pp2": _parallel(pp=2),
        "pp2-vpp2": _parallel(pp=2, vpp=2),
        "pp2-uneven": _parallel(pp=2, first_stage_layers=1),
    },
    "context": {"cp1": {}, "cp2": _parallel(cp=2), "cp4": _parallel(cp=4)},
    "data": {"dp1": {}, "dp2": {}},
}
# What one process without any of it must give as well: the settings below change the result.
MEANING: dict[str, dict[str, Settings]] = {
    "family": {
        "mistral": {},
        "gemma2": {"model": GEMMA},
        "gemma3": {"model": GEMMA3},  # norms of heads, two kinds of rotary positions
        "qwen2": {"model": QWEN2},  # biases
        "qwen3": {"model": QWEN3},  # norms of heads
        "llama": {"model": LLAMA},  # rotary positions stretched by wave length
        "ministral3": {"model": MINISTRAL3},  # yarn; queries scaled by their positions
        "smollm3": {"model": SMOLLM3},  # a layer without rotary positions
        "olmo2": {"model": OLMO2},  # norms behind branches, and of all heads together
    },
    "tower": {
        "siglip": {},
        "clip": {"model": CLIP},
        "aimv2": {"model": AIMV2},  # gates in the MLP, RMS norms, no biases
        "no-positions": {"model": {"visual_positions": False}},
    },
    "v2v": {"v2v-diagonal": {}, "v2v-causal": _attention(v2v="causal")},
    "t2v": {"t2v-none": {}, "t2v-rope": _attention(t2v_position="rope")},
    "merge": {"alpha": {}, "sum": _attention(merge="sum")},
    "images": {
        "one-tile": {},
        "anyres-stretch": _data(image_policy="anyres_stretch"),
        "anyres-letterbox": _data(image_policy="anyres_letterbox"),
    },
    "trains": {
        "all-parts": {},
        "frozen-tower": _train(trains=("projector", "llm")),
        "projector-alone": _train(trains=("projector",)),
    },
}
# These change how it is computed, and nothing of the result.
MEANS: dict[str, dict[str, Settings]] = {
    "visual rows": {
        "folded-and-ended-early": {},
        "unfolded": _attention(fold_visual_projection=False),
        "to-the-end": _attention(skip_last_visual_rows=False),
    },
    "visual chunks": {"visual-at-once": {}, "visual-chunks": _train(recompute_visual_chunk=24)},
    "loss chunks": {"loss-at-once": {}, "loss-chunks": _train(loss_chunk=7)},
    "recompute": {
        "kept": {},
        "full": _train(recompute="full"),
        "full-one-layer": _train(recompute="full", recompute_layers=1),
        "selective": _train(recompute="selective"),
        "selective-mlp": _train(recompute="selective", recompute_modules=("mlp", "core_attn")),
    },
    "packing": {
        "packs": {},
        "small-packs": {},  # budgets that hold little more than one sample: see `_budgets`
        "unpadded": _data(pad_multiple=1),
        "fixed-rows": _data(fixed_rows=True),
    },
    "overlap": {
        "no-overlap": {},
        "overlap-gradients": _parallel(overlap_grad_reduce=True),
        "overlap-both": _parallel(overlap_grad_reduce=True, overlap_param_gather=True),
    },
    "run": {  # the last two are stopped by a signal in step 1
        "uninterrupted": {},
        "resumed-async": {"checkpoint": {"asynchronous": True}},
        "resumed-on-one": {},  # by one process, which reads what all ranks have written
    },
}
FACTORS = {**LAYOUT, **MEANING, **MEANS}
USUAL = {name: next(iter(values)) for name, values in FACTORS.items()}
# What one process computes for comparison: all rows to the end, in one pack, those of an image
# once for each of its samples, and by the attention backend that keeps its scores.
PLAIN = {
    **_attention(backend="reference", fold_visual_projection=False, skip_last_visual_rows=False),
    **_data(text_budget=4096, visual_budget=4096, share_images=False),
}

REFUSED = "refused: the settings cannot go together"
MOST_PROCESSES = 8
POINTLESS = "one replica has no other to exchange with"


def _excluded() -> dict[Pair, str]:
    """Pairs that no run can hold, and why."""
    reasons = {}
    for overlap in ("overlap-gradients", "overlap-both"):
        reasons[_pair(("overlap", overlap), ("visual chunks", "visual-chunks"))] = REFUSED
        reasons[_pair(("overlap", overlap), ("data", "dp1"))] = POINTLESS
    reasons[_pair(("v2v", "v2v-causal"), ("visual chunks", "visual-chunks"))] = REFUSED
    for context in ("cp2", "cp4"):
        reasons[_pair(("v2v", "v2v-causal"), ("context", context))] = REFUSED
    return reasons


def _pair(*settings: tuple[str, str]) -> Pair:
    return frozenset(settings)


EXCLUDED = _excluded()
FOUR = {"tensor": "tp2-sp", "pipeline": "pp2"}
# Three and more at once where a fault is most likely: what each rank does depends on all of them.
REQUIRED = [
    {"tensor": "tp2", "pipeline": "pp2", "data": "dp2"},
    {**FOUR, "family": "gemma2", "visual chunks": "visual-chunks", "loss chunks": "loss-chunks"},
    {**FOUR, "v2v": "v2v-causal", "t2v": "t2v-rope", "merge": "alpha"},  # the baseline
    {**FOUR, "v2v": "v2v-diagonal", "t2v": "t2v-none", "merge": "sum"},
    {**FOUR, "v2v": "v2v-causal", "t2v": "t2v-none", "merge": "sum"},
    {**FOUR, "images": "anyres-stretch", "data": "dp1"},
    {"pipeline": "pp2-vpp2", "data": "dp2", "overlap": "overlap-both"},
    {"pipeline": "pp2", "data": "dp2", "overlap": "overlap-both"},
    {"data": "dp2", "overlap": "overlap-both", "trains": "frozen-tower"},
    {"data": "dp2", "overlap": "overlap-both", "run": "resumed-on-one"},
    # The last stage has nothing to train, but must pass gradients on, and nothing to save.
    {"pipeline": "pp2", "trains": "projector-alone", "visual chunks": "visual-chunks"},
    {"pipeline": "pp2", "trains": "projector-alone", "run": "resumed-async"},
    {"tensor": "tp2-sp", "recompute": "full", "visual chunks": "visual-chunks"},
    # A row's position in its sample, and a layer's number in the whole model, follow from no shard
    # or stage, and are the same where a layer is computed again.
    {**FOUR, "family": "ministral3", "visual chunks": "visual-chunks", "recompute": "selective"},
    {**FOUR, "family": "smollm3", "recompute": "full"},
    {**FOUR, "context": "cp2"},
]


def processes(case: dict[str, str]) -> int:
    """Ranks that a case needs, or some of its settings."""
    return math.prod(int(case[name][2]) for name in LAYOUT if name in case)  # "tp2-sp" is of two


CASES = pairwise(
    {name: tuple(values) for name, values in FACTORS.items()},
    EXCLUDED.keys(),
    REQUIRED,
    lambda case: processes(case) <= MOST_PROCESSES,
)


def case_id(case: dict[str, str]) -> str:
    """Its number, its layout, and what is not as usual."""
    shown = [case[name] for name in LAYOUT]
    shown += [case[name] for name in (*MEANING, *MEANS) if case[name] != USUAL[name]]
    return " ".join([f"{CASES.index(case) + 1:02d}", *shown])


def settings_of(case: dict[str, str]) -> Settings:
    """Sections of its configuration."""
    sections: Settings = {}
    for name, value in case.items():
        sections = merge(sections, FACTORS[name][value])
    return merge(_budgets(case), sections)


def plain_case(case: dict[str, str]) -> dict[str, str]:
    """The run that must give the same: one process, and nothing but what changes the result."""
    return {name: case[name] if name in MEANING else USUAL[name] for name in case}


def _budgets(case: dict[str, str]) -> Settings:
    """Room for about six samples, or for the largest alone."""
    small = case["packing"] == "small-packs"
    if case["images"] == "one-tile":  # of 16 rows
        a_tile_a_rank = 64 if case["context"] == "cp4" else 32
        return _data(text_budget=80 if small else 128, visual_budget=a_tile_a_rank if small else 96)
    # Two images of at most five tiles.
    return _data(text_budget=80 if small else 128, visual_budget=160 if small else 192)


def with_every_value(names: Collection[str]) -> list[dict[str, str]]:
    """Some of the cases, which together hold every value of these factors."""
    left = {(name, value) for name in names for value in FACTORS[name]}
    chosen = []
    while left:
        chosen.append(max(CASES, key=lambda case: len(left & set(case.items()))))
        left -= set(chosen[-1].items())
    return chosen


def numbers(*settings: tuple[str, str]) -> list[int]:
    """Numbers of the cases that hold two settings."""
    return [n for n, case in enumerate(CASES, start=1) if _pair(*settings) in pairs_of(case)]
