"""What the dry run says of `parallel.tower`, where several tensor parallel ranks have a choice."""

from __future__ import annotations

from dattn_mcore.config.schema import Config
from dattn_mcore.plan.rows import rows_of
from dattn_mcore.plan.tower_work import cheaper, tower_cost
from dattn_mcore.plan.workload import Sample, full_budget_sample, step_of


def tower_lines(config: Config, dp: int) -> list[str]:
    """Operations and traffic of both ways for a full micro-batch, and the better one.

    Args:
        config: a checked configuration.
        dp: data parallel size.
    """
    per_tile = config.model.vision.rows_per_tile
    tiles = config.data.visual_budget // per_tile
    if config.parallel.tp == 1 or tiles == 0:
        return []
    pack = rows_of(config, [((True, tiles * per_tile), (False, 1))], 1)
    sample = Sample(full_budget_sample(config, 1.0), 1.0)
    packs = step_of(config, sample, dp).num_microbatches
    tensor, by_tiles = (tower_cost(config, pack, work) for work in ("tensor", "tiles"))
    better = cheaper(config, pack, packs)
    said = "each is less in one" if better is None else f"{better} is less in all"
    if tiles < config.parallel.tp * config.parallel.cp:
        said = "tiles cannot be, with fewer tiles than ranks"
    return [
        f"vision tower of a full micro-batch ({tiles} tiles) on a rank: parallel.tower=tensor "
        f"{tensor.operations:.3g} operations and {tensor.bytes / 2**20:.3g} MiB sent, tiles "
        f"{by_tiles.operations:.3g} and {by_tiles.bytes / 2**20:.3g} MiB, and "
        f"{by_tiles.bytes_per_step / 2**20:.3g} MiB of gradients a step of {packs} micro-batches: "
        f"{said}"
    ]
