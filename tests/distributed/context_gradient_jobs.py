"""What the pool's workers run: the gradients of a step whose packs context parallel ranks divide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed.finalize_model_grads import finalize_model_grads

from dattn_mcore.config.schema import Config
from dattn_mcore.data.batch import MicroBatch
from dattn_mcore.training.inputs import all_model_inputs, with_own_tiles
from dattn_mcore.training.model import build_from_config
from dattn_mcore.training.optimizer import build_optimizer, wrap_ddp
from dattn_mcore.training.step import run_schedule, sum_reports
from dattn_mcore.types import IGNORED_LABEL, NO_IMAGES, Layout, image_shapes
from tests.distributed.gradient_jobs import pieces, randomize_adapters
from tests.distributed.jobs import start
from tests.distributed.model_jobs import randomize_norms

Grid = tuple[int, int]


@dataclass(frozen=True)
class PackOf:
    """A pack to be filled at random.

    Attributes:
        layouts: of its samples.
        units: the visual unit of each sample.
        grids: of each unit the canvases of its images.
    """

    layouts: tuple[Layout, ...]
    units: tuple[int, ...]
    grids: tuple[tuple[Grid, ...], ...] = ()


@dataclass(frozen=True)
class StepGradients:
    """Of one rank.

    Attributes:
        loss: mean over the supervised tokens.
        pieces: (key, offset, shape of the whole, gradient), as the optimizer gets them.
        norm: of all gradients.
    """

    loss: float
    pieces: list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]
    norm: float


def filled(config: Config, pack: PackOf, seed: int, shared: bool) -> MicroBatch:
    """Random text, labels and tiles; those of a unit once (`shared`), or once for each sample."""
    generator = torch.Generator().manual_seed(seed)
    size, vocab = config.model.vision.image_size, config.model.llm.vocab_size
    rows = sum(n for layout in pack.layouts for is_visual, n in layout if not is_visual)
    ids, labels = torch.randint(0, vocab, (2, rows), generator=generator)
    labels[torch.rand(rows, generator=generator) >= 0.6] = IGNORED_LABEL
    tiles = [
        torch.randint(
            0,
            256,
            (sum(1 + columns * lines for columns, lines in of_unit), 3, size, size),
            generator=generator,
            dtype=torch.uint8,
        )
        for of_unit in pack.grids
    ]
    shown = range(len(tiles)) if shared else [unit for unit in pack.units if unit != NO_IMAGES]
    return MicroBatch(
        layouts=pack.layouts,
        text_ids=ids,
        labels=labels,
        num_tiles=sum(len(tiles[unit]) for unit in shown),
        tiles=torch.cat([tiles[unit] for unit in shown]) if shown else None,
        sample_ids=(),
        num_samples=len(pack.layouts),
        items=image_shapes(grid for unit in shown for grid in pack.grids[unit]),
        images_of=pack.units if shared and tiles else (),
    )


def step_gradients(tree: dict[str, Any], packs: list[PackOf], shared: bool) -> StepGradients:
    """A step's gradients after all reductions, of every rank whole.

    Args:
        tree: of the configuration.
        packs: of the step; data parallel ranks take them in turn.
        shared: samples share images.
    """
    config, groups = start(tree)
    device = torch.device("cpu")
    chunks = build_from_config(config, groups, device)
    for chunk in chunks:
        randomize_norms(chunk)
        randomize_adapters(chunk)
    whole = [filled(config, pack, seed, shared) for seed, pack in enumerate(packs)]
    mine = whole[groups.dp.rank() :: groups.dp.size()]
    inputs = all_model_inputs(
        [with_own_tiles(pack, groups) for pack in mine], config, groups, device
    )
    wrapped = wrap_ddp(chunks, config, groups)
    optimizer = build_optimizer(config, wrapped)
    for chunk in wrapped:
        chunk.force_all_reduce = True  # every rank gets all of a gradient, not its part
        chunk.zero_grad_buffer()
    chunks[0].config.finalize_model_grads_func = _finalize
    reports = run_schedule(wrapped, inputs, groups, forward_only=False)
    sums, _ = sum_reports(reports, inputs[0])
    found = [
        (piece.key, tuple(piece.global_offset), tuple(piece.global_shape), piece.data)
        for chunk in chunks
        for _, piece in pieces(chunk)
    ]
    optimizer.prepare_grads()
    return StepGradients(
        loss=float(sums[0, 0] / sums[0, 2]), pieces=found, norm=float(optimizer.get_grad_norm())
    )


def _finalize(model: Any, num_tokens: Any = None, **named: Any) -> None:
    finalize_model_grads(model, num_tokens, **{**named, "force_all_reduce": True})
