"""`--rehearse N`: one rank of a job of N processes at its true size, on this machine.

Megatron-Core's model, DDP, distributed optimizer and schedule run as in training, one micro-batch a
step, with process groups that exchange nothing and tensors that have a shape and no memory
(`parallel.rehearsal`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_rank

from dattn_mcore.config.checks import data_parallel_size
from dattn_mcore.config.schema import Config
from dattn_mcore.data.batch import MicroBatch
from dattn_mcore.layers.layout import to_device
from dattn_mcore.models.dattn import ModelInputs
from dattn_mcore.parallel import groups
from dattn_mcore.parallel.collectives import Collective, group_names
from dattn_mcore.parallel.rehearsal import FusedKernels, Shapes, fake_world
from dattn_mcore.training.ema import Ema
from dattn_mcore.training.inputs import all_model_inputs, with_own_tiles
from dattn_mcore.training.model import build_from_config
from dattn_mcore.training.optimizer import build_optimizer, wrap_ddp
from dattn_mcore.training.schedule import build_scheduler
from dattn_mcore.training.step import train_step
from dattn_mcore.types import Layout


@dataclass(frozen=True)
class Rehearsed:
    """What a rank holds and exchanges.

    Attributes:
        rank: in the world.
        stage: of the pipeline.
        dp: data parallel replicas.
        copies: ranks that hold the same weights: data times context parallel ones.
        copy: which of them this rank is.
        num_microbatches: of the step.
        weights: bytes, padding of buffers and the running mean of the weights included.
        gradients: bytes.
        optimizer: bytes of masters and moments.
        other: bytes that stay beside these, such as what sequence parallelism gathers into.
        activations: most bytes that are alive after a forward pass and were not before the step.
        logits: most bytes at once of tensors as wide as this rank's share of the vocabulary.
        peak: most bytes at once, in forward and backward, that were not there before the step.
        collectives: of the step, in their order.
    """

    rank: int
    stage: int
    dp: int
    copies: int
    copy: int
    num_microbatches: int
    weights: int
    gradients: int
    optimizer: int
    other: int
    activations: int
    logits: int
    peak: int
    collectives: tuple[Collective, ...]


def as_rehearsed(config: Config) -> tuple[Config, list[str]]:
    """The configuration that is rehearsed: without what needs a GPU, and what that changes.

    Args:
        config: a checked configuration.
    """
    train, parallel, llm = config.train, config.parallel, config.model.llm
    said = ["linears and norms: Megatron-Core's own (local); norms keep their input in float32"]
    if train.fp8 != "none":
        said.append(f"train.fp8={train.fp8} is left out: copies in FP8 are not seen")
    if parallel.tp_comm_overlap:
        said.append("parallel.tp_comm_overlap is left out: its collectives are those without it")
    modules = tuple(module for module in train.recompute_modules if module != "layernorm")
    if modules != train.recompute_modules and train.recompute == "selective":
        said.append("layernorm of train.recompute_modules is left out: it needs Transformer Engine")
    said.append("attention: shapes of PyTorch's flash kernels, without soft-cap and window")
    config = dataclasses.replace(
        config,
        attention=dataclasses.replace(config.attention, backend="sdpa"),
        parallel=dataclasses.replace(parallel, tp_comm_overlap=False),
        train=dataclasses.replace(
            train,
            fp8="none",
            deterministic=False,
            transformer_impl="local",
            recompute="none" if not modules else train.recompute,
            recompute_modules=modules or train.recompute_modules,
        ),
        # Neither changes a shape, and PyTorch's kernels know neither on what is no CPU.
        model=dataclasses.replace(
            config.model,
            llm=dataclasses.replace(llm, attention_softcap=None, sliding_window=None),
        ),
    )
    return config, said


def full_pack(config: Config) -> MicroBatch:
    """A micro-batch with both budgets full: samples of one tile, all text rows with a label."""
    vision, data = config.model.vision, config.data
    tiles = data.visual_budget // vision.rows_per_tile
    samples = max(1, tiles)
    layouts: list[Layout] = []
    for index in range(samples):
        text = data.text_budget // samples + (index < data.text_budget % samples)
        image = ((True, vision.rows_per_tile),) if tiles else ()
        layouts.append((*image, (False, text)))
    return pack_of(config, layouts)


def pack_of(config: Config, layouts: Sequence[Layout]) -> MicroBatch:
    """A micro-batch of samples; ids, labels and pixels are zero."""
    rows = {kind: sum(n for la in layouts for k, n in la if k is kind) for kind in (True, False)}
    tiles, size = rows[True] // config.model.vision.rows_per_tile, config.model.vision.image_size
    ids = torch.zeros(rows[False], dtype=torch.int64)
    return MicroBatch(
        layouts=tuple(layouts),
        text_ids=ids,
        labels=ids.clone(),
        num_tiles=tiles,
        tiles=torch.zeros((tiles, 3, size, size), dtype=torch.uint8) if tiles else None,
        sample_ids=(),
        num_samples=len(layouts),
    )


def last_stage_rank(config: Config, world_size: int) -> int:
    """The last stage's rank of rank 0's pipeline."""
    with fake_world(0, world_size), _layout(config) as pg_collection:
        return dist.get_process_group_ranks(pg_collection.pp)[-1]


def rehearse(config: Config, world_size: int, rank: int, packs: list[MicroBatch]) -> Rehearsed:
    """Builds a rank and runs one training step.

    Args:
        config: from `as_rehearsed`.
        world_size: processes of the job.
        rank: which of them.
        packs: of this rank's replica, whole.
    """
    with fake_world(rank, world_size) as device, _layout(config) as pg_collection:
        width = config.model.llm.padded_vocab_size // config.parallel.tp
        shapes = Shapes(group_names(pg_collection), width)
        with shapes, torch.device(device):
            chunks = build_from_config(config, pg_collection, device, initialize=False)
            model = wrap_ddp(chunks, config, pg_collection)
            optimizer = build_optimizer(config, model)
            scheduler = build_scheduler(config, optimizer, 2)
            mean = Ema(config, model) if config.train.ema_decay is not None else None
        with shapes:
            shapes.collectives.clear()  # those of building happen once
            own = [with_own_tiles(pack, pg_collection) for pack in packs]
            real = all_model_inputs(own, config, pg_collection, torch.device("cpu"))
            inputs = [_on_device(one, device) for one in real]
        watched = _Watched(shapes, model, optimizer)
        with shapes, torch.device(device), FusedKernels():
            train_step(model, optimizer, scheduler, inputs, pg_collection)
        weights, gradients = _buffers(model)
        if mean is not None:
            weights += sum(t.nbytes for means in mean.means for t in means.values())
        states = _states(optimizer)
        return Rehearsed(
            rank=rank,
            stage=get_pg_rank(pg_collection.pp),
            dp=data_parallel_size(config, world_size),
            copies=pg_collection.dp_cp.size(),
            copy=get_pg_rank(pg_collection.dp_cp),
            num_microbatches=len(packs),
            weights=weights,
            gradients=gradients,
            optimizer=states,
            other=shapes.live - weights - gradients - states,
            activations=watched.kept,
            logits=shapes.wide_peak,
            peak=watched.peak,
            collectives=tuple(shapes.collectives),
        )


class _Watched:
    """Bytes that a step adds to what was alive before it.

    Attributes:
        kept: most at the end of a chunk's forward pass.
        peak: most at once before the optimizer's update.
    """

    def __init__(
        self, shapes: Shapes, model: list[DistributedDataParallel], optimizer: MegatronOptimizer
    ) -> None:
        self.shapes, self.before = shapes, shapes.start()
        self.kept = self.peak = 0
        for chunk in model:
            chunk.register_forward_hook(self._after_forward)
        self._update = optimizer.step
        optimizer.step = self._before_update

    def _after_forward(self, *_: Any) -> None:
        self.kept = max(self.kept, self.shapes.live - self.before)

    def _before_update(self) -> Any:
        self.peak = self.shapes.peak - self.before
        return self._update()


@contextlib.contextmanager
def _layout(config: Config) -> Iterator[ProcessGroupCollection]:
    """Megatron-Core's groups of the configuration's layout."""
    sizes = config.parallel
    try:
        yield groups.initialize_model_parallel(
            seed=config.train.seed, tp=sizes.tp, pp=sizes.pp, vpp=sizes.vpp, cp=sizes.cp
        )
    finally:
        groups.destroy_model_parallel()


def _on_device(inputs: ModelInputs, device: torch.device) -> ModelInputs:
    """Without memory, but for labels: how many there are sets shapes."""
    params = to_device(inputs.params, device)
    tiles = None if inputs.tiles is None else inputs.tiles.to(device)
    share = None if inputs.tile_share is None else inputs.tile_share.to(device)
    return dataclasses.replace(
        inputs,
        params=params,
        text_ids=inputs.text_ids.to(device),
        tiles=tiles,
        tile_share=share,
    )


def _buffers(model: list[DistributedDataParallel]) -> tuple[int, int]:
    """Bytes of weights and of gradients."""
    buffers = [buffer for chunk in model for buffer in chunk.buffers]
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    frozen = sum(p.nbytes for p in parameters if not p.requires_grad)
    weights = frozen + sum(buffer.param_data.nbytes for buffer in buffers)
    return weights, sum(buffer.grad_data.nbytes for buffer in buffers)


def _states(optimizer: MegatronOptimizer) -> int:
    """Bytes of float32 masters and of Adam's moments."""
    total = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.is_stub_optimizer:
            continue
        for shard in part.shard_fp32_from_float16_groups:
            total += sum(master.nbytes for master in shard if master is not None)
        for state in part.optimizer.state.values():
            total += sum(state[moment].nbytes for moment in ("exp_avg", "exp_avg_sq"))
    return total
