"""`stats`: what a data set holds and how a run would pack it, in tables and pictures."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dattn_mcore.config.schema import Config
from dattn_mcore.config.sharing import why_apart
from dattn_mcore.data.balance import row_work
from dattn_mcore.data.budgets import Fates
from dattn_mcore.data.context_balance import (
    PackLayout,
    balance_rows,
    context_balance,
    context_lines,
)
from dattn_mcore.data.index.layout import FORMATS
from dattn_mcore.data.index.store import Index, open_index
from dattn_mcore.data.packing import Pack
from dattn_mcore.data.packing_figures import PackingFigures, StepSamples, measure_packing
from dattn_mcore.data.pages.html import embedded, page, table, write_page
from dattn_mcore.data.run_order import order_of_run
from dattn_mcore.data.shared_images import images_of, units_of
from dattn_mcore.data.steps import steps_of
from dattn_mcore.data.tokenizer import Tokenizer
from dattn_mcore.types import Layout

_STEPS = 50  # that are packed to see how full packs get
_BLUE, _RED, _GREY = "#3b7dd8", "#c0392b", "#999999"
_QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)


def write_stats(
    config: Config, tokenizer: Tokenizer, output: Path, workers: int, dp_size: int
) -> list[str]:
    """Writes the page.

    Args:
        config: The run.
        tokenizer: Its tokenizer, opened.
        output: The page.
        workers: Processes that make the index where it is absent.
        dp_size: Data-parallel ranks to pack for.

    Returns:
        Lines to print: how even work is over context parallel ranks, with `parallel.cp`.

    Raises:
        DataError: The page cannot be written.
    """
    index = open_index(config, tokenizer, workers)
    usable = np.flatnonzero(np.asarray(index.usable))
    samples = index.samples[usable]
    text = samples["text_rows"].astype(np.int64)
    visual = samples["num_tiles"].astype(np.int64) * config.model.vision.rows_per_tile
    images = index.images[: index.content["num_images"]]
    packed = packing_of(index, config, dp_size)
    body = [
        "<h2>Samples</h2>",
        table(["source", "samples", "usable", "weight"], _sources(index), "sources"),
        table(["reason", "unusable"], _reasons(index), "reasons"),
        "<h2>Lengths</h2>",
        table(
            ["rows of a sample", *(f"{100 * q:g} %" for q in _QUANTILES), "all"],
            [_quantiles("text", text), _quantiles("visual", visual)]
            + [_quantiles("predicted", samples["supervised"].astype(np.int64))],
            "lengths",
        ),
        _lengths(text, visual, images, config),
        "<h2>Images</h2>",
        table(["format", "images"], _formats(images), "formats"),
        table(["tiles of an image", "images"], _counts(images["num_tiles"]), "tiles"),
        f"<h2>Packing, {dp_size} data parallel rank(s)</h2>",
        table(["of the first steps", "value"], _packing(packed), "packing"),
        "<h2>Images shown by several samples</h2>",
        table(["of the first steps", "value"], _sharing(packed, config), "sharing"),
        _packs(packed.figures, images, dp_size),
    ]
    lines, context = _context(packed, config)
    write_page(output, page(f"Data of {index.folder.name}", [*body, context]))
    return lines


@dataclass(frozen=True)
class Packed:
    """How the first steps of a run are packed and shared out.

    Attributes:
        figures: Of the steps.
        over: Samples that fit no pack and are left out.
        cut: Samples that are cut to fit one (data.over_budget=truncate).
        same: Visual rows of samples whose images another sample of the step shows alike: what
            sharing would save if all of them were in one pack.
        overlapping: Visual rows of images that a step shows more than once, beyond these: samples
            that have images in common, and others too, share none.
        layouts: Packs of all steps, as the model sees them.
    """

    figures: PackingFigures
    over: int
    cut: int
    same: int
    overlapping: int
    layouts: tuple[PackLayout, ...]


def packing_of(index: Index, config: Config, dp_size: int) -> Packed:
    """Packs the first steps of a run and shares them out."""
    data, per_tile = config.data, config.model.vision.rows_per_tile
    budgets = (data.text_budget, data.visual_budget)
    order = order_of_run(config, index)
    fates = Fates(index, config)
    cut = steps_of(config, order, fates)
    steps, over, num_cut, same, overlapping = [], 0, 0, 0, 0
    of_steps = []
    for step in range(max(1, min(_STEPS, cut.up_to(order.epoch_size + 1) - 1))):
        numbers = order.numbers(*cut.bounds(step))
        samples = [one for one in map(fates.fit, numbers) if one is not None]
        lengths = [(one.text_rows, one.num_tiles * per_tile) for one in samples]
        over += len(numbers) - len(samples)
        num_cut += int(fates.cut[numbers].sum())
        shown = sum(visual for _, visual in lengths)
        units = units_of(samples, shares=True)
        by_unit = sum(dict(zip(units, (visual for _, visual in lengths), strict=True)).values())
        images = {
            (image.identity, image.num_tiles): image.num_tiles * per_tile
            for sample in samples
            for image in sample.images
        }
        same += shown - by_unit
        overlapping += max(by_unit - sum(images.values()), 0)
        shares = why_apart(config) is None
        steps.append(StepSamples(lengths, units_of(samples, shares=shares)))
        of_steps.append([sample.layouts(per_tile) for sample in samples])
    figures = measure_packing(steps, budgets, dp_size, row_work(config))
    layouts = [
        _pack_layout(pack, step.units, texts)
        for made, step, texts in zip(figures.made, steps, of_steps, strict=True)
        for pack in made
        if pack
    ]
    return Packed(figures, over, num_cut, same, overlapping, tuple(layouts))


def _pack_layout(
    pack: Pack, units: Sequence[int], texts: Sequence[tuple[Layout, ...]]
) -> PackLayout:
    """A pack with a sample for each branch, as a micro-batch has it."""
    layouts = [layout for sample in pack for layout in texts[sample]]
    repeated = [units[sample] for sample in pack for _ in texts[sample]]
    return PackLayout(tuple(layouts), images_of(repeated))


def _context(packed: Packed, config: Config) -> tuple[list[str], str]:
    """What is printed of the balance over context parallel ranks, and its part of the page."""
    if config.parallel.cp == 1 or not packed.layouts:
        return [], ""
    balance = context_balance(packed.layouts, config)
    lines = context_lines(balance)
    title = f"<h2>Packs over {balance.ranks} context parallel ranks</h2>"
    columns = ["heaviest rank over the mean", "on average", "at most"]
    rows = balance_rows(balance)
    rows += [[line, "", ""] for line in lines[len(rows) :]]
    return lines, title + table(columns, rows, "context")


def _sharing(packed: Packed, config: Config) -> list[list[Any]]:
    """What sharing saves, and what keeps it from saving more."""
    shown = max(sum(packed.figures.shown), 1)
    reason = why_apart(config)
    return [
        ["visual rows of samples", sum(packed.figures.shown)],
        ["computed", sum(packed.figures.computed)],
        ["saved", f"{100 * packed.figures.saved:.1f} %" + (f" ({reason})" if reason else "")],
        ["saved if all samples of the same images shared a pack", _percent(packed.same, shown)],
        ["of samples whose images overlap in part, not saved", _percent(packed.overlapping, shown)],
    ]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _packing(packed: Packed) -> list[list[Any]]:
    figures, over = packed.figures, packed.over
    steps, (text, visual) = len(figures.packs), figures.fills
    return [
        ["steps planned", steps],
        ["samples of a step", f"{(sum(figures.samples) + over) / steps:.1f}"],
        ["packs of a step", f"{sum(figures.packs) / steps:.1f}"],
        ["text budget filled", f"{100 * text:.1f} %"],
        ["visual budget filled", f"{100 * visual:.1f} %"],
        ["heaviest rank above the mean", f"{100 * max(figures.heaviest):.1f} %"],
        ["samples over budget, left out", over],
        ["samples over budget, cut", packed.cut],
    ]


def _sources(index: Index) -> list[list[Any]]:
    rows = []
    for (start, end), source in zip(index.source_ranges(), index.settings.sources, strict=True):
        usable = int(np.asarray(index.usable[start:end]).sum())
        rows.append([source.name, end - start, usable, f"{source.weight:g}"])
    return rows


def _reasons(index: Index) -> list[list[Any]]:
    """Reasons with what is particular taken out, so that like ones are counted together."""
    counts: Counter[str] = Counter()
    for entry in index.bad():
        reason = entry["reason"].replace(f"'{entry['path']}' ", "")
        counts[reason.split(" (")[0].split(" below '")[0].split(":")[0][:80]] += 1
    return [[reason, count] for reason, count in counts.most_common(20)]


def _quantiles(name: str, rows: np.ndarray) -> list[Any]:
    if not len(rows):
        return [name, *(0 for _ in _QUANTILES), 0]
    return [name, *(int(value) for value in np.quantile(rows, _QUANTILES)), int(rows.sum())]


def _formats(images: np.ndarray) -> list[list[Any]]:
    return [[FORMATS[int(kind)], count] for kind, count in _counts(images["format"])]


def _counts(values: np.ndarray) -> list[list[Any]]:
    found, counts = np.unique(np.asarray(values), return_counts=True)
    return [[int(value), int(count)] for value, count in zip(found, counts, strict=True)]


def _lengths(text: np.ndarray, visual: np.ndarray, images: np.ndarray, config: Config) -> str:
    """Lengths, and sizes of images, as a picture."""
    figure, axes = _figure(3)
    for axis, rows, name, budget in (
        (axes[0], text, "text", config.data.text_budget),
        (axes[1], visual, "visual", config.data.visual_budget),
    ):
        axis.hist(np.minimum(rows, budget * 1.05), bins=40, color=_BLUE)
        if len(rows) and budget < 1.5 * rows.max():
            axis.axvline(budget, color=_RED, linewidth=1)
        axis.set_title(f"{name} rows of a sample (data.{name}_budget: {budget:,})", fontsize=9)
    some = images[:: max(1, len(images) // 5000)]
    axes[2].plot(some["width"], some["height"], ".", markersize=2, color=_BLUE)
    axes[2].set_title("width and height of images, pixels", fontsize=9)
    return _embed(figure, "histograms of lengths and image sizes")


def _packs(figures: PackingFigures, images: np.ndarray, dp_size: int) -> str:
    """Tiles of images, how full each step is, and how even the ranks, as a picture."""
    figure, axes = _figure(3)
    tiles = _counts(images["num_tiles"])
    axes[0].bar([str(number) for number, _ in tiles], [count for _, count in tiles], color=_BLUE)
    axes[0].set_title("tiles of an image", fontsize=9)
    steps = range(1, len(figures.packs) + 1)
    for kind, name, colour in ((0, "text", _GREY), (1, "visual", _BLUE)):
        filled = [
            100 * rows[kind] / packs
            for rows, packs in zip(figures.rows, figures.packs, strict=True)
        ]
        axes[1].plot(steps, filled, ".-", color=colour, label=name)
    axes[1].set_ylim(0, 102)
    axes[1].legend(fontsize=8)
    axes[1].set_title("budget filled in each step, %", fontsize=9)
    axes[2].bar(steps, [100 * share for share in figures.heaviest], color=_BLUE)
    axes[2].set_title(f"heaviest of {dp_size} rank(s) above the mean, %", fontsize=9)
    return _embed(figure, "tiles, fill of packs and balance of ranks")


def _figure(count: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, count)


def _embed(figure: Any, title: str) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return f"<p>{embedded(out.getvalue(), 'png', 1000, title)}</p>"
