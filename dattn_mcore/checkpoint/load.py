"""Finds the newest whole checkpoint, verifies it on all ranks together, and loads it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dattn_mcore.architectures.projector import TIME_POSITION
from dattn_mcore.checkpoint import folders, fp8_scales, state
from dattn_mcore.checkpoint.adapters import has_base
from dattn_mcore.checkpoint.content import EMA, check_content, only_weights, read_object
from dattn_mcore.checkpoint.manifest import read_manifest
from dattn_mcore.checkpoint.metadata import read_metadata
from dattn_mcore.checkpoint.reasons import ANY_FAILURE, reason
from dattn_mcore.checkpoint.same_run import check_same_model
from dattn_mcore.config.optim_groups import layers_differ
from dattn_mcore.config.saved import saved_config
from dattn_mcore.config.schema import Config
from dattn_mcore.errors import CheckpointError
from dattn_mcore.models.dattn import DattnModel
from dattn_mcore.models.initialize import initialize_entries
from dattn_mcore.parallel import platform

logger = logging.getLogger(__name__)


def choose_checkpoint(path: Path, fall_back: bool = True) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint behind a path; all ranks get the same answer.

    Rank 0 lists the candidates; every rank verifies a share of the files.

    Args:
        path: a run folder, its folder of checkpoints, or a checkpoint.
        fall_back: report a damaged checkpoint and try the one before; a run that goes on loses
            some steps by that, but another stage must not start from them unasked.

    Returns:
        Folder and manifest, or None where no checkpoint was ever finished.

    Raises:
        CheckpointError: there are checkpoints, but all (without `fall_back`: the newest) are
            damaged.
    """
    candidates: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            candidates = [folders.find_checkpoints(path)]
        except CheckpointError:
            candidates = [[]]
        except OSError as error:
            candidates = [f"{path} cannot be read ({error.strerror}); fix its permissions"]
    dist.broadcast_object_list(candidates, src=0)
    if isinstance(candidates[0], str):
        raise CheckpointError(candidates[0])
    for folder in candidates[0]:
        problem = _verify(folder)
        if problem is None:
            return folder, read_manifest(folder)
        if not fall_back:
            older = f", or name an older one ({candidates[0][1].name})" if candidates[0][1:] else ""
            raise CheckpointError(f"{folder} cannot be read: {problem}; restore it{older}")
        if dist.get_rank() == 0:
            logger.warning("warning: checkpoint %s cannot be read: %s", folder, problem)
    if candidates[0]:
        raise CheckpointError(
            f"no checkpoint in {path} is readable (see the warnings above); restore one, or "
            "start in another log.run_dir"
        )
    return None


def _verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint, the same on every rank; each hashes a share of the files."""
    problem = None
    try:
        manifest = read_manifest(folder)
        files = manifest["files"]
        names = sorted(files)[dist.get_rank() :: dist.get_world_size()]
        problem = folders.damage(folder, names, files)
        if problem is None and dist.get_rank() == 0:  # before Megatron-Core reads it
            check_content(folder, manifest)
    except (CheckpointError, OSError) as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((item for item in problems if item is not None), None)


def load_weights(
    path: Path, config: Config, chunks: list[DattnModel], pg_collection: ProcessGroupCollection
) -> Path:
    """Loads the weights of a run or checkpoint, and nothing else (`checkpoint.init_from`).

    Adapters of the model keep their values. A model of images may become one of videos, whose
    positions in time then start as those of a fresh model do.

    Raises:
        CheckpointError: none there, all damaged, another model's, or adapters alone.
    """
    found = choose_checkpoint(path, fall_back=False)
    if found is None:
        raise CheckpointError(
            f"checkpoint.init_from={path} holds no finished checkpoint; name a run folder or a "
            "folder step_... in it"
        )
    folder, manifest = found
    check_same_model(config, manifest, folder, for_videos=True)
    if has_base(manifest):
        raise CheckpointError(
            f"checkpoint.init_from={path}: {folder} holds adapters alone, beside the weights of "
            f"{manifest['base']['path']}; export it (mcore-to-hf merges them) and convert that "
            "back (hf-to-mcore), or start from the base with lora.init_from"
        )
    whole = state.model_state(chunks, pg_collection, "base")
    new = ""
    if config.model.time_positions and not saved_config(manifest["config"]).model.time_positions:
        new = TIME_POSITION
        whole = {
            chunk: {name: entry for name, entry in entries.items() if not name.startswith(new)}
            for chunk, entries in whole.items()
        }
        logger.info("%s has no positions in time; they start anew", folder)
    content = _load(folder, whole)
    _put_weights(content, chunks, "base", new)
    if new:
        initialize_entries(chunks, config.model, config.train.seed, prefix=new)
    return folder


def load_adapters(
    folder: Path, chunks: list[DattnModel], pg_collection: ProcessGroupCollection
) -> None:
    """Loads what a run with adapters has saved, and nothing else, over the weights of its base.

    Args:
        folder: a checkpoint of adapters, accepted by `check_same_model` and `check_base`.
        chunks: this rank's model chunks, with the same parts frozen.
        pg_collection: process groups.

    Raises:
        CheckpointError: the content does not fit.
    """
    _put_weights(_load(folder, state.model_state(chunks, pg_collection, "run")), chunks, "run")


def resume(
    folder: Path,
    manifest: dict[str, Any],
    chunks: list[DattnModel],
    optimizer: MegatronOptimizer,
    pg_collection: ProcessGroupCollection,
) -> int:
    """Loads weights, optimizer, FP8 scales and RNG of a checkpoint, saved in any layout.

    Args:
        folder: from `choose_checkpoint`.
        manifest: from `choose_checkpoint`, accepted by `check_same_run`.
        chunks: this rank's model chunks, without DDP.
        optimizer: Megatron-Core's optimizer over them.
        pg_collection: process groups.

    Returns:
        Optimizer steps that were done.

    Raises:
        CheckpointError: the content does not fit.
    """
    model = learning = state.model_state(chunks, pg_collection, "run")
    if layers_differ(saved_config(manifest["config"])):
        learning = state.model_state(chunks, pg_collection, "run", by_layer=True)
    content: dict[str, Any] = {
        **model,
        "optimizer": state.optimizer_state(optimizer, learning, pg_collection, is_loading=True),
    }
    layout = state.layout_of(pg_collection)
    index = read_metadata(folder)
    rng, old_rng = state.rng_state(pg_collection, layout), state.old_rng_key(pg_collection, layout)
    has_rng = tuple(manifest["layout"]) == layout and _holds(index, rng)
    if has_rng:
        content["rng"] = rng
    scales = fp8_scales.tensors_of(chunks)
    sharded_scales = fp8_scales.scales_state(scales, pg_collection)
    has_scales = bool(scales) and _holds(index, sharded_scales)
    if has_scales:
        content["fp8"] = sharded_scales
    elif scales:
        logger.info("%s holds no FP8 scales for this run; they begin at 1", folder)
    loaded = _load(folder, content)
    _put_weights(loaded, chunks, "run")
    if has_scales:
        for name, tensor in scales.items():
            tensor.copy_(loaded["fp8"][name])
    try:
        _take_own_groups(loaded["optimizer"], optimizer, folder)
        if has_rng:
            platform.set_rng_state(state.nested_rng(loaded["rng"]))
        elif old_rng in index.state_dict_metadata:
            (states,) = read_object(folder, index, old_rng)
            platform.set_rng_state(states)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{folder} does not fit this run ({reason(error)})") from error
    optimizer.load_state_dict(loaded["optimizer"])
    return int(manifest["step"])


def holds_ema(folder: Path) -> bool:
    """Whether a checkpoint has a running mean of its weights."""
    return any(key.startswith(EMA) for key in read_metadata(folder).state_dict_metadata)


def load_ema(
    folder: Path,
    chunks: list[DattnModel],
    means: list[dict[str, Tensor]],
    pg_collection: ProcessGroupCollection,
) -> None:
    """Loads the running mean of the weights of a checkpoint, saved in any layout.

    Args:
        folder: from `choose_checkpoint`.
        chunks: this rank's model chunks, without DDP.
        means: of these, float32 by the names of parameters; overwritten.
        pg_collection: process groups.

    Raises:
        CheckpointError: it is a mean of other parameters.
    """
    content = state.ema_state(state.model_state(chunks, pg_collection), means)
    loaded = _load(folder, dict(content))
    for index, chunk in enumerate(means):
        for name, mean in chunk.items():
            mean.copy_(loaded[f"ema{index}"][name])


def _holds(index: Metadata, tensors: dict[str, ShardedTensor]) -> bool:
    """Whether a checkpoint has these tensors in their shapes: a GPU's RNG is not a CPU's."""
    sizes = {
        key: tuple(stored.size)
        for key, stored in index.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    return all(sizes.get(tensor.key) == tensor.global_shape for tensor in tensors.values())


def _load(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    try:
        with only_weights():
            return dist_checkpointing.load(
                content, str(folder), strict=StrictHandling.RAISE_UNEXPECTED
            )
    except ANY_FAILURE as error:
        # The files are as they were written (verified), so this is a mismatch of content.
        raise CheckpointError(f"{folder} does not fit this run ({reason(error)})") from error


def _take_own_groups(content: dict[Any, Any], optimizer: MegatronOptimizer, folder: Path) -> None:
    """Puts this optimizer's groups in the place of the checkpoint's; their count of steps stays.

    Megatron-Core would put the checkpoint's settings (`lr`, `betas`, `max_lr`) back, and knows only
    groups that both have. So one Adam also goes on in another: PyTorch's counts steps in float32
    and has other fields than a fused one.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    contents = [content] if len(parts) == 1 else [part for _, part in sorted(content.items())]
    if len(parts) != len(contents):
        raise CheckpointError(
            f"{folder} holds {len(contents)} optimizers and this run has {len(parts)}; keep "
            "parallel.vpp"
        )
    for part, saved in zip(parts, contents, strict=True):
        if part.is_stub_optimizer:
            continue
        inner = saved["optimizer"]
        counts = sorted({int(group["step"]) for group in inner["param_groups"] if "step" in group})
        if len(counts) > 1:
            raise CheckpointError(
                f"{folder} counts {', '.join(map(str, counts))} steps in its groups of parameters; "
                "use another checkpoint"
            )
        count = {"step": counts[0]} if counts else {}
        inner["param_groups"] = [
            {name: value for name, value in group.items() if name not in ("params", "step")} | count
            for group in part.optimizer.state_dict()["param_groups"]
        ]


def _put_weights(
    content: dict[str, Any], chunks: list[DattnModel], kind: state.Kind, new: str = ""
) -> None:
    """Puts weights into the model; those whose names begin with `new` are left as they are."""
    for index, chunk in enumerate(chunks):
        # A stage where nothing learns has saved nothing.
        own = content.get(f"model{index}", {})
        missing, unexpected = chunk.load_state_dict(own, strict=False)
        wanted = state.names_of_kind(chunk, kind)
        others = {name for name, _ in chunk.named_parameters()} - set(wanted)
        missing = [
            name for name in missing if not name.endswith("_extra_state") and name not in others
        ]
        missing = [name for name in missing if not (new and name.startswith(new))]
        if missing or unexpected:
            raise CheckpointError(
                f"checkpoint lacks {missing or 'nothing'} and has {unexpected or 'nothing'} more"
            )
    dist.barrier()
