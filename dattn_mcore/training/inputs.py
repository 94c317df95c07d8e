"""From the data pipeline's micro-batches to tensors on this rank's device."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_rank, get_pg_src_rank

from dattn_mcore.config.checks import row_multiple
from dattn_mcore.config.schema import Config
from dattn_mcore.data.batch import MicroBatch
from dattn_mcore.layers.context import own_text_rows, share_of
from dattn_mcore.layers.layout import build_seq_params, padded_rows, round_up, to_device
from dattn_mcore.models.dattn import ModelInputs
from dattn_mcore.models.tile_share import TileShare, share_tiles
from dattn_mcore.models.tower_work import place_in_group
from dattn_mcore.types import IGNORED_LABEL, tiles_of_rank


def needs_pixels(pg_collection: ProcessGroupCollection) -> bool:
    """Whether this rank decodes images: the first tensor rank of a replica's first stage."""
    return get_pg_rank(pg_collection.pp) == 0 and get_pg_rank(pg_collection.tp) == 0


def with_own_tiles(micro_batch: MicroBatch, pg_collection: ProcessGroupCollection) -> MicroBatch:
    """A pack that was made with all of its tiles, as the data path gives it to this rank.

    Args:
        micro_batch: with all tiles.
        pg_collection: process groups; `cp` is used.
    """
    if micro_batch.tiles is None:
        return micro_batch
    context = pg_collection.cp
    own = tiles_of_rank(micro_batch.num_tiles, get_pg_rank(context), context.size())
    return replace(micro_batch, tiles=micro_batch.tiles[own.start : own.stop])


def fixed_rows(config: Config) -> tuple[int, int]:
    """Visual and text rows of every micro-batch with `data.fixed_rows`: both budgets, padded."""
    multiple = row_multiple(config)
    return (
        round_up(config.data.visual_budget, multiple),
        round_up(config.data.text_budget, multiple),
    )


def all_model_inputs(
    micro_batches: list[MicroBatch],
    config: Config,
    pg_collection: ProcessGroupCollection,
    device: torch.device,
) -> list[ModelInputs]:
    """Prepares the packs of a step; see `to_model_inputs`.

    With a pipeline all are padded to the rows of the largest, so that stages need not tell each
    other shapes before each exchange. Packs are balanced, so the largest is not much larger. With
    `data.fixed_rows` all packs of the run have the shape of the budgets.
    """
    at_least = (0, 0)
    if config.data.fixed_rows:
        at_least = fixed_rows(config)
    elif config.parallel.pp > 1:
        multiple = row_multiple(config)
        rows = [padded_rows(item.layouts, multiple, item.images_of) for item in micro_batches]
        at_least = (max(visual for visual, _ in rows), max(text for _, text in rows))
    return [
        to_model_inputs(item, config, pg_collection, device, at_least) for item in micro_batches
    ]


def to_model_inputs(
    micro_batch: MicroBatch,
    config: Config,
    pg_collection: ProcessGroupCollection,
    device: torch.device,
    at_least: tuple[int, int] = (0, 0),
) -> ModelInputs:
    """Pads rows, works out visibility, and shares pixels within the tensor parallel group.

    uint8 tiles are broadcast (a quarter of the bytes of float32) and normalised by the model.

    Args:
        micro_batch: one pack; its `tiles` are present on the first tensor rank of stage 0 only,
            of a pack that context parallel ranks divide those of this rank.
        config: the run's configuration.
        pg_collection: process groups; every rank of a replica must call this in the same order.
        device: where the tensors go.
        at_least: visual and text rows to pad up to.
    """
    context, tower = pg_collection.cp, config.parallel.tower
    params = build_seq_params(
        micro_batch.layouts,
        t2v_position=config.attention.t2v_position,
        multiple=row_multiple(config),
        at_least=at_least,
        images_of=micro_batch.images_of,
    )
    rows = torch.arange(params.num_text)
    share = None
    part, parts = place_in_group(pg_collection, tower)
    if parts > 1:
        share = share_tiles(
            num_tiles=micro_batch.num_tiles,
            items=micro_batch.items,
            side=config.model.vision.grid_size,
            num_visual=params.num_visual,
            rank=part,
            ranks=parts,
        )
    if context.size() > 1:
        rank = get_pg_rank(context)
        params = share_of(params, rank, context.size())
        assert params.context is not None
        rows = own_text_rows(params.context, rank)
    padding = (0, (params.context or params).num_text - micro_batch.text_ids.shape[0])
    text_ids = F.pad(micro_batch.text_ids, padding)[rows]
    labels = F.pad(micro_batch.labels, padding, value=IGNORED_LABEL)[rows]
    tiles = None
    if get_pg_rank(pg_collection.pp) == 0 and micro_batch.num_tiles:
        tiles = _shared_tiles(micro_batch, share, config, pg_collection, device)
    groups = weights = None
    if micro_batch.weights:
        weights = _of_labels(micro_batch, torch.tensor(micro_batch.weights), rows, labels)
        weights = weights.to(device, non_blocking=True)
    if micro_batch.groups:
        groups = _of_labels(micro_batch, torch.tensor(micro_batch.groups), rows, labels)
        groups = groups.to(device, non_blocking=True)
    elif micro_batch.num_groups:
        groups = torch.empty(0, dtype=torch.int64, device=device)
    return ModelInputs(
        params=to_device(params, device),
        text_ids=text_ids.to(device, non_blocking=True),
        labels=labels.to(device, non_blocking=True),
        tiles=tiles,
        items=micro_batch.items,
        groups=groups,
        num_groups=micro_batch.num_groups,
        weights=weights,
        tile_share=None if share is None else share.to(device),
    )


def _shared_tiles(
    micro_batch: MicroBatch,
    share: TileShare | None,
    config: Config,
    pg_collection: ProcessGroupCollection,
    device: torch.device,
) -> torch.Tensor:
    """uint8 tiles of this rank, from the first tensor parallel rank, which has decoded them.

    Where each tensor parallel rank encodes tiles of its own, these are consecutive: all get those
    of all, a few bytes beside the rows that they become.
    """
    size = config.model.vision.image_size
    own = _of_tensor_ranks(micro_batch.num_tiles, share, config, pg_collection)
    tiles = micro_batch.tiles
    if tiles is None:
        tiles = torch.empty((len(own), 3, size, size), dtype=torch.uint8)
    assert len(tiles) == len(own)
    tiles = tiles.to(device, non_blocking=True)
    if pg_collection.tp.size() > 1 and len(own):
        source = get_pg_src_rank(pg_collection.tp)
        dist.broadcast(tiles, src=source, group=pg_collection.tp)
    if share is None:
        return tiles
    return tiles[share.tiles.start - own.start : share.tiles.stop - own.start]


def _of_tensor_ranks(
    num_tiles: int,
    share: TileShare | None,
    config: Config,
    pg_collection: ProcessGroupCollection,
) -> range:
    """Tiles of the ranks of a tensor parallel group; they encode the same ones, or follow on."""
    if share is None:
        return range(num_tiles)
    if config.parallel.tower == "tensor":
        return share.tiles
    rank, ranks = place_in_group(pg_collection, "tiles")
    first = rank - get_pg_rank(pg_collection.tp)
    last = first + pg_collection.tp.size() - 1
    return range(
        tiles_of_rank(num_tiles, first, ranks).start, tiles_of_rank(num_tiles, last, ranks).stop
    )


def _of_labels(
    micro_batch: MicroBatch, values: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """A value of each sample [samples], for each row with a label [labelled rows].

    Args:
        micro_batch: the pack.
        values: see above.
        rows: int64, text rows of the padded pack that are wanted.
        labels: of these.
    """
    lengths = [sum(rows for visual, rows in layout if not visual) for layout in micro_batch.layouts]
    of_rows = torch.repeat_interleave(values, torch.tensor(lengths))
    labelled = labels != IGNORED_LABEL
    return of_rows[rows[labelled]]
