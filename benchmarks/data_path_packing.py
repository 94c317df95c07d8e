"""How full packs get, and how even the ranks' work is, on lengths like LLaVA's."""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import ROOT
from dattn_mcore.config.load import load_config
from dattn_mcore.data.balance import row_work
from dattn_mcore.data.order import SampleOrder, Share
from dattn_mcore.data.packing_figures import StepSamples, measure_packing
from dattn_mcore.data.steps import full_steps

SAMPLES = 20_000
STEPS = 60


def llava_like(rng: random.Random, anyres: bool) -> tuple[int, int]:
    """(text rows, visual rows) like LLaVA's instruction mix.

    6 % text only and long (ShareGPT), the rest one image with one or several short turns (VQA) or
    one long answer (detail, captions); 729 rows a view, up to five views.
    """
    if rng.random() < 0.06:
        return min(2048, max(30, round(rng.lognormvariate(6.5, 0.7)))), 0
    mean, spread = rng.choice([(4.6, 0.5), (5.3, 0.4), (6.0, 0.6)])
    text = min(2048, max(12, round(rng.lognormvariate(mean, spread))))
    views = rng.choices([3, 4, 5], [0.45, 0.15, 0.4])[0] if anyres else 1
    return text, 729 * views


def steps_of_mix(anyres: bool, count: int) -> tuple[list[list[tuple[int, int]]], tuple[int, int]]:
    """Lengths of the first steps over the mix, and the budgets, as configs/gemma_it.yaml has them.

    AnyRes has twice the visual budget: an image has up to five views.
    """
    config = load_config(ROOT / "configs" / "gemma_it.yaml")
    multiple = config.data.step_packs_multiple
    assert multiple is not None
    budgets = (config.data.text_budget, config.data.visual_budget * (2 if anyres else 1))
    rng = random.Random(1)
    rows = np.array([llava_like(rng, anyres) for _ in range(SAMPLES)], np.int64)
    order = SampleOrder([Share(np.arange(SAMPLES))], config.train.seed)
    steps = full_steps(order, rows, budgets, config.train.global_batch_size, multiple)
    chosen = [order.numbers(*steps.bounds(step)) for step in range(count)]
    return [[(int(rows[n, 0]), int(rows[n, 1])) for n in numbers] for numbers in chosen], budgets


def packing(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """How full packs get, and how even the ranks' work is, with the budgets of configs/."""
    work = row_work(load_config(ROOT / "configs" / "gemma_it.yaml"))
    result: dict[str, Any] = {}
    for name, anyres in (("square", False), ("anyres", True)):
        lengths, budgets = steps_of_mix(anyres, STEPS)
        steps = [StepSamples(step) for step in lengths]
        result[f"{name}: samples of a step"] = round(sum(map(len, lengths)) / STEPS, 1)
        for dp_size in (1, 2, 4):
            started = time.perf_counter()
            figures = measure_packing(steps, budgets, dp_size, work)
            seconds = time.perf_counter() - started
            text, visual = figures.fills
            result |= {
                f"{name}, dp {dp_size}: text budget filled, %": round(100 * text, 1),
                f"{name}, dp {dp_size}: visual budget filled, %": round(100 * visual, 1),
                f"{name}, dp {dp_size}: heaviest rank over the mean, %": round(
                    100 * max(figures.heaviest), 2
                ),
                f"{name}, dp {dp_size}: ms to plan a step": round(1000 * seconds / STEPS, 1),
            }
    return result
