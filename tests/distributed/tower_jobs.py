"""What the pool's workers run for a tower whose tiles are divided over tensor parallel ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from dattn_mcore.config.schema import Config
from dattn_mcore.data.batch import MicroBatch
from dattn_mcore.parallel.collectives import Tracer, group_names
from dattn_mcore.training.inputs import all_model_inputs, with_own_tiles
from dattn_mcore.training.model import build_from_config
from dattn_mcore.training.optimizer import build_optimizer, wrap_ddp
from dattn_mcore.training.step import run_schedule
from dattn_mcore.types import IGNORED_LABEL, Layout, image_shapes
from tests.distributed.gradient_jobs import Gradient, pieces
from tests.distributed.jobs import start
from tests.distributed.model_jobs import randomize_norms

# Samples of a pack, and the canvases of its images.
Pack = tuple[tuple[Layout, ...], tuple[tuple[int, int], ...]]


@dataclasses.dataclass
class Step:
    """What a rank has of a step, before the optimizer's update.

    Attributes:
        gradients: its pieces of them, reduced.
        norm: of all, as Megatron-Core has it.
        loss: sum over tokens of this rank's rows; None but on the last stage's first tensor rank.
        tiles: that its tower encoded, of each micro-batch with any.
    """

    gradients: list[Gradient]
    norm: float
    loss: float | None
    tiles: list[int]


def step_of_packs(tree: dict[str, Any], packs: list[Pack]) -> Step:
    """A step over packs of random text and tiles, which come in as a run's do."""
    config, groups = start(tree)
    chunks = build_from_config(config, groups, torch.device("cpu"))
    encoded: list[int] = []
    for chunk in chunks:
        randomize_norms(chunk)
        if chunk.pre_process:
            chunk.vision.register_forward_hook(lambda *call: encoded.append(len(call[2])))
    micro_batches = [
        with_own_tiles(micro_batch(config, pack, number), groups)
        for number, pack in enumerate(packs)
    ]
    if groups.tp.rank():  # which has decoded nothing
        micro_batches = [dataclasses.replace(item, tiles=None) for item in micro_batches]
    inputs = all_model_inputs(micro_batches, config, groups, torch.device("cpu"))
    wrapped = wrap_ddp(chunks, config, groups)
    optimizer = build_optimizer(config, wrapped)
    for chunk in wrapped:
        chunk.force_all_reduce = True  # every rank gets all of a gradient, not its part
    reduce: Any = chunks[0].config.finalize_model_grads_func

    def finalize(model: Any, num_tokens: Any = None, **named: Any) -> None:
        reduce(model, num_tokens, **{**named, "force_all_reduce": True})

    chunks[0].config.finalize_model_grads_func = finalize
    reports = run_schedule(wrapped, inputs, groups, forward_only=False)
    place = (groups.dp.rank(), groups.pp.rank(), groups.tp.rank())
    found = [
        Gradient(
            name=name,
            key=one.key,
            offset=tuple(one.global_offset),
            shape=tuple(one.global_shape),
            place=place,
            declared="",
            before=None,
            after=one.data,
        )
        for chunk in chunks
        for name, one in pieces(chunk)
    ]
    optimizer.prepare_grads()
    return Step(
        gradients=found,
        norm=float(optimizer.get_grad_norm()),
        loss=float(sum(report[0, 0] for report in reports)) if reports else None,
        tiles=encoded,
    )


def micro_batch(config: Config, pack: Pack, seed: int) -> MicroBatch:
    """A pack of random ids, labels and tiles."""
    layouts, image_grids = pack
    generator = torch.Generator().manual_seed(seed)
    rows = {
        kind: sum(n for layout in layouts for is_visual, n in layout if is_visual == kind)
        for kind in (True, False)
    }
    num_tiles, size = (
        rows[True] // config.model.vision.rows_per_tile,
        config.model.vision.image_size,
    )
    ids, labels = torch.randint(
        0, config.model.llm.vocab_size, (2, rows[False]), generator=generator
    )
    labels[::3] = IGNORED_LABEL
    tiles = torch.randint(
        0, 256, (num_tiles, 3, size, size), generator=generator, dtype=torch.uint8
    )
    return MicroBatch(
        layouts=layouts,
        text_ids=ids,
        labels=labels,
        num_tiles=num_tiles,
        tiles=tiles if num_tiles else None,
        sample_ids=tuple(str(number) for number in range(len(layouts))),
        num_samples=len(layouts),
        items=image_shapes(image_grids),
    )


def bytes_before_the_layers(tree: dict[str, Any], pack: Pack) -> float:
    """Bytes that this rank sends for the visual rows of a pack, forward and backward."""
    config, groups = start(tree)
    (model,) = build_from_config(config, groups, torch.device("cpu"))
    item = with_own_tiles(micro_batch(config, pack, 1), groups)
    (inputs,) = all_model_inputs([item], config, groups, torch.device("cpu"))
    rows = len(inputs.text_ids) // (groups.tp.size() if config.parallel.sp else 1)
    text = torch.zeros(rows, 1, config.model.llm.hidden_size)
    model.embedding.forward = lambda ids, positions: text
    with Tracer(group_names(groups)) as tracer:
        model._embed(inputs).square().sum().backward()
    return sum(one.sent for one in tracer.collectives)
