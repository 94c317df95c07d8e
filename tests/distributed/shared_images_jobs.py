"""What the pool's workers run for samples that share images: losses and gradients of a model."""

from __future__ import annotations

from typing import Any

import torch

from dattn_mcore.config.checks import row_multiple
from dattn_mcore.layers.layout import build_seq_params
from dattn_mcore.models.dattn import DattnModel, ModelInputs
from dattn_mcore.training.model import build_from_config
from dattn_mcore.types import IGNORED_LABEL, NO_IMAGES, Layout, image_shapes
from tests.distributed.jobs import start
from tests.distributed.model_jobs import randomize_norms

Grid = tuple[int, int]


def losses_and_gradients(
    tree: dict[str, Any],
    layouts: tuple[Layout, ...],
    units: tuple[int, ...],
    grids: tuple[tuple[Grid, ...], ...],
    shared: bool,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses of the labelled rows, and the gradients of their mean, in float64, by autograd alone.

    Args:
        tree: of the configuration.
        layouts: of the samples.
        units: the visual unit of each sample.
        grids: of each unit the canvases of its images.
        shared: the rows of a unit stand once; else each sample has a copy.
    """
    config, groups = start(tree)
    (model,) = build_from_config(config, groups, torch.device("cpu"))
    randomize_norms(model)
    to_float64(model)
    inputs = _inputs(config, layouts, units, grids, shared)
    losses = model(inputs)
    losses.mean().backward()
    gradients = {
        name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None
    }
    return losses.detach().double(), gradients


def to_float64(model: DattnModel) -> None:
    """All but the position networks of the projector, which compute in float32 by themselves."""
    model.double()
    if not hasattr(model, "projector"):  # a later stage of a pipeline
        return
    for part in (model.projector.row_position, model.projector.column_position):
        if part is not None:
            part.float()


def _inputs(
    config: Any,
    layouts: tuple[Layout, ...],
    units: tuple[int, ...],
    grids: tuple[tuple[Grid, ...], ...],
    shared: bool,
) -> ModelInputs:
    generator = torch.Generator().manual_seed(3)
    size, vocab = config.model.vision.image_size, config.model.llm.vocab_size
    tiles = [
        torch.randint(
            0,
            256,
            (sum(1 + columns * rows for columns, rows in of_unit), 3, size, size),
            generator=generator,
            dtype=torch.uint8,
        )
        for of_unit in grids
    ]
    shown = range(len(grids)) if shared else [unit for unit in units if unit != NO_IMAGES]
    params = build_seq_params(
        layouts,
        t2v_position=config.attention.t2v_position,
        multiple=row_multiple(config),
        images_of=units if shared else (),
    )
    assert params.num_visual >= sum(len(tiles[unit]) for unit in shown)
    ids, labels = torch.randint(0, vocab, (2, params.num_text), generator=generator)
    labels[torch.rand(params.num_text, generator=generator) >= 0.6] = IGNORED_LABEL
    labels[sum(params.text_lengths) :] = IGNORED_LABEL
    return ModelInputs(
        params=params,
        text_ids=ids,
        labels=labels,
        tiles=torch.cat([tiles[unit] for unit in shown]),
        items=image_shapes(grid for unit in shown for grid in grids[unit]),
    )
