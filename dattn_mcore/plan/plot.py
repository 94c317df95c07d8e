"""Time and memory over the number of visual rows: D-Attn beside the baseline."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from dattn_mcore.config.schema import Config
from dattn_mcore.plan.estimate import Plan, plan_unchecked
from dattn_mcore.plan.hardware import Cluster, Gpu
from dattn_mcore.plan.workload import Sample

MOST_ROWS = 2**20  # visual rows of the longest sample, at least
CONTEXT_SIZES = (1, 2, 4, 8)  # context parallel ranks
_MARKERS = {1: "o", 2: "s", 4: "^", 8: "D"}


@dataclass(frozen=True)
class Curve:
    """One kind of attention on one number of context parallel ranks.

    Attributes:
        name: D-Attn or baseline.
        cp: context parallel ranks; the baseline has ring attention on several.
        points: visual rows of a sample, and the plan.
    """

    name: str
    cp: int
    points: tuple[tuple[int, Plan], ...]

    @property
    def label(self) -> str:
        """For the legend."""
        if self.cp == 1:
            return self.name
        ring = " with ring attention" if self.name == "baseline" else ""
        return f"{self.name}{ring}, cp {self.cp}"


def baseline(config: Config) -> Config:
    """The same run with stock causal self-attention over `[visual; text]`."""
    attention = dataclasses.replace(config.attention, v2v="causal", t2v_position="rope")
    train = dataclasses.replace(config.train, recompute_visual_chunk=None)
    return dataclasses.replace(config, attention=attention, train=train)


def over_visual_rows(
    config: Config, cluster: Cluster, gpu: Gpu, fp8: bool, text: float
) -> list[Curve]:
    """D-Attn and the baseline on each number of ranks that the cluster has, one sample a pack.

    A curve starts where every context parallel rank has a tile.

    Args:
        config: a checked configuration; with the layout but for `parallel.cp`.
        cluster: GPUs in nodes.
        gpu: their kind.
        fp8: linears of the language model in FP8.
        text: text rows of a sample.
    """
    per_tile, parallel = config.model.vision.rows_per_tile, config.parallel
    images = [1]
    while images[-1] * per_tile < MOST_ROWS:
        images.append(2 * images[-1])
    sizes = dict.fromkeys([*CONTEXT_SIZES, parallel.cp])
    curves = []
    for cp in (cp for cp in sizes if cluster.world_size % (parallel.tp * parallel.pp * cp) == 0):
        divided = dataclasses.replace(config, parallel=dataclasses.replace(parallel, cp=cp))
        for name, kind in (("D-Attn", divided), ("baseline", baseline(divided))):
            points = []
            for number in (number for number in images if number >= cp):
                rows = number * per_tile
                data = dataclasses.replace(
                    config.data, visual_budget=rows, text_budget=max(1, round(text))
                )
                fixed = dataclasses.replace(kind, data=data)
                sample = Sample(data.text_budget, number)
                points.append((rows, plan_unchecked(fixed, cluster, gpu, fp8, sample)))
            curves.append(Curve(name, cp, tuple(points)))
    return curves


def draw(curves: list[Curve], path: Path, title: str) -> None:
    """Writes the picture (PNG, SVG or PDF, by the file's ending)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    # Unlike lines and markers: where curves coincide, the first shows between the dashes.
    lines = {"D-Attn": "-", "baseline": (0, (4, 4))}
    for number, curve in enumerate(curves):
        rows = [rows for rows, _ in curve.points]
        plans = [plan for _, plan in curve.points]
        is_baseline = curve.name == "baseline"
        marker = "x" if is_baseline else _MARKERS.get(curve.cp, "v")
        colour = f"C{number // 2}"
        for axes, values in (
            (time, [plan.seconds for plan in plans]),
            (memory, [plan.worst.total / 2**30 for plan in plans]),
        ):
            axes.plot(
                rows,
                values,
                linestyle=lines[curve.name],
                marker=marker,
                markersize=4,
                color=colour,
                label=curve.label,
            )
    gpu = curves[0].points[0][1].gpu
    memory.axhline(gpu.memory / 2**30, linestyle=":", color="grey", label=gpu.name)
    time.set_ylabel("seconds a step")
    memory.set_ylabel("GiB a GPU")
    for axes in (time, memory):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("visual rows of a sample")
        axes.grid(alpha=0.3)
    memory.legend(fontsize="small")
    figure.suptitle(
        f"{title}\none sample a micro-batch; cp takes GPUs from dp; planned, not measured",
        fontsize="medium",
    )
    figure.savefig(path)
    pyplot.close(figure)
