"""Time and memory over the number of visual rows: D-Attn beside the baseline."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dattn_mcore.config.schema import Config
from dattn_mcore.plan.estimate import Plan, make_plan
from dattn_mcore.plan.hardware import Cluster, Gpu
from dattn_mcore.plan.workload import Sample

IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


def baseline(config: Config) -> Config:
    """The same run with stock causal self-attention over `[visual; text]`."""
    attention = dataclasses.replace(config.attention, v2v="causal", t2v_position="rope")
    train = dataclasses.replace(config.train, recompute_visual_chunk=None)
    return dataclasses.replace(config, attention=attention, train=train)


def over_visual_rows(
    config: Config, cluster: Cluster, gpu: Gpu, fp8: bool, text: float
) -> list[tuple[int, Plan, Plan]]:
    """(visual rows of a sample, D-Attn, baseline), one sample a micro-batch."""
    points = []
    for images in IMAGES:
        rows = images * config.model.vision.rows_per_tile
        data = dataclasses.replace(config.data, visual_budget=rows, text_budget=max(1, round(text)))
        fixed = dataclasses.replace(config, data=data)
        sample = Sample(data.text_budget, images)
        dattn = make_plan(fixed, cluster, gpu, fp8, sample)
        points.append((rows, dattn, make_plan(baseline(fixed), cluster, gpu, fp8, sample)))
    return points


def draw(points: list[tuple[int, Plan, Plan]], path: Path, title: str) -> None:
    """Writes the picture (PNG, SVG or PDF, by the file's ending)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [point[0] for point in points]
    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    # Unlike lines and markers: where curves coincide, the first shows between the dashes.
    styles = {"D-Attn": ("-", "o"), "baseline": ((0, (4, 4)), "x")}
    for index, (name, (line, marker)) in enumerate(styles.items(), start=1):
        plans = [point[index] for point in points]
        assert all(isinstance(plan, Plan) for plan in plans)
        style = {"linestyle": line, "marker": marker, "label": name}
        time.plot(rows, [plan.seconds for plan in plans], **style)  # type: ignore[union-attr]
        used = [plan.worst.total / 2**30 for plan in plans]  # type: ignore[union-attr]
        memory.plot(rows, used, **style)
    available = points[0][1].gpu.memory / 2**30
    memory.axhline(available, linestyle=":", color="grey", label=points[0][1].gpu.name)
    time.set_ylabel("seconds a step")
    memory.set_ylabel("GiB a GPU")
    for axes in (time, memory):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("visual rows of a sample")
        axes.legend()
        axes.grid(alpha=0.3)
    figure.suptitle(f"{title}\none sample a micro-batch; planned, not measured", fontsize="medium")
    figure.savefig(path)
    pyplot.close(figure)
