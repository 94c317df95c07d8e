"""What `parallel.tower` costs a rank: the vision tower divided by its tensors, or by tiles.

Of a micro-batch of N tiles of p rows on tp x cp ranks, a tower of L layers of width v that sees s
rows a tile, rows of h in the language model, e bytes a number, r = (tp - 1) / tp:

    tensor   operations of ceil(N / cp) tiles / tp. All-reduces of all rows of these tiles: two in a
             layer's forward pass and two in its backward pass, 2 e r v s each; one behind the
             projector, 2 e r h p, and one of what entered it in backward, 2 e r v p. With sequence
             parallelism e r h p more in backward, where gradients of rows are gathered.
    tiles    operations of ceil(N / (tp cp)) tiles. Rows that another rank carries through the
             layers, e h each; in backward the gradients of those that others encoded. Without
             sequence parallelism e r h of each row of the context parallel rank, which all get.
             Once a step: 8 r bytes of each parameter of tower and projector that learns.

With `tensor` and cp > 1 the rows go to other ranks as well, by context parallel ranks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dattn_mcore.architectures import tower_features
from dattn_mcore.config.schema import Config
from dattn_mcore.plan.backward import learning_outside, tower_gradients
from dattn_mcore.plan.communication import tower_gradient_bytes
from dattn_mcore.plan.context import rows_dealt
from dattn_mcore.plan.flops import step_work
from dattn_mcore.plan.parameters import BYTES
from dattn_mcore.plan.rows import Rows
from dattn_mcore.types import TowerWork

_ROUNDING = 1e-9


@dataclass(frozen=True)
class TowerCost:
    """Of the rank of a first stage that has most to do.

    Attributes:
        tiles: of a micro-batch that it works on.
        operations: of tower and projector for a micro-batch, forward and backward.
        bytes: that it sends for a micro-batch to ranks of its tp x cp group.
        bytes_per_step: that it sends beside them, once a step.
    """

    tiles: int
    operations: float
    bytes: float
    bytes_per_step: float


def tower_cost(config: Config, pack: Rows, work: TowerWork) -> TowerCost:
    """What a way to divide the tower costs, whichever the configuration has.

    Args:
        config: a checked configuration.
        pack: rows of a micro-batch, of all its context parallel ranks; its images have one tile.
        work: the way.
    """
    parallel = dataclasses.replace(config.parallel, tower=work)
    config = dataclasses.replace(config, parallel=parallel)
    tp, cp, number = parallel.tp, parallel.cp, round(pack.tiles)
    ranks = cp * tp if work == "tiles" else cp
    tiles = -(-number // ranks)
    per_tile = config.model.vision.rows_per_tile
    row = BYTES[config.train.precision] * config.model.llm.hidden_size
    behind = _projector_learns(config)
    dealt = rows_dealt(number, per_tile, ranks)
    sent = float(row * max(given + behind * got for given, got in dealt))
    of_step = 0.0
    if work == "tensor":
        sent += _all_reduced(config, tiles) * (tp - 1) / tp
        if parallel.sp and behind:
            sent += row * number * per_tile / cp * (tp - 1) / tp
    else:
        if not parallel.sp:
            sent += row * number * per_tile / cp * (tp - 1) / tp
        of_step = tower_gradient_bytes(config, 0)
    return TowerCost(
        tiles=tiles,
        operations=_operations(config, pack, tiles / (tp if work == "tensor" else 1)),
        bytes=sent,
        bytes_per_step=of_step,
    )


def cheaper(config: Config, pack: Rows, num_microbatches: int) -> TowerWork | None:
    """The way that computes and sends less in a step; None where each is ahead in one.

    Args:
        config: a checked configuration.
        pack: see `tower_cost`.
        num_microbatches: of a replica in a step.
    """
    if config.parallel.tp == 1:
        return None
    tensor, tiles = (tower_cost(config, pack, work) for work in ("tensor", "tiles"))
    of_tensor, of_tiles = (
        (one.operations, one.bytes * num_microbatches + one.bytes_per_step)
        for one in (tensor, tiles)
    )
    if _no_more(of_tiles, of_tensor):
        return "tiles"
    return "tensor" if _no_more(of_tensor, of_tiles) else None


def _no_more(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return all(a <= b * (1 + _ROUNDING) for a, b in zip(one, other, strict=True))


def _projector_learns(config: Config) -> bool:
    """Whether anything behind the visual rows of the language model learns."""
    outside = learning_outside(config)
    return outside.features or any(key.startswith("projector.") for key in outside.keys)


def _all_reduced(config: Config, tiles: int) -> float:
    """Twice the bytes of the tensors that tensor parallel ranks add up for their tiles."""
    vision, e = config.model.vision, BYTES[config.train.precision]
    seen = vision.rows_per_tile + tower_features(config.model).class_row
    learned = sum(gradients.any for gradients in tower_gradients(config))
    of_tower = 4 * vision.hidden_size * seen * (vision.layers_run + learned)
    of_projector = 2 * config.model.llm.hidden_size
    if _projector_learns(config):
        of_projector += 2 * vision.hidden_size
    return e * tiles * (of_tower + of_projector * vision.rows_per_tile)


def _operations(config: Config, pack: Rows, tiles: float) -> float:
    """Of so many tiles, and of positions, which each rank computes once."""
    own = dataclasses.replace(pack, tiles=tiles)
    work = step_work(config, own)
    return work["tower"].executed + work["projector"].executed
