"""Finds the newest whole checkpoint, verifies it on all ranks together, and loads it."""

from __future__ import annotations

import json
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
from dattn_mcore.checkpoint.adapters import check_same_adapters, has_base
from dattn_mcore.checkpoint.content import EMA, check_content, only_weights, read_object
from dattn_mcore.checkpoint.manifest import is_of_a_run, read_manifest
from dattn_mcore.checkpoint.metadata import read_metadata
from dattn_mcore.checkpoint.reasons import ANY_FAILURE, reason
from dattn_mcore.config.load import to_dict
from dattn_mcore.config.optim_groups import layers_differ, resolved
from dattn_mcore.config.saved import saved_config
from dattn_mcore.config.schema import Config
from dattn_mcore.data.index.identity import difference, image_changes, same_samples
from dattn_mcore.errors import CheckpointError, ConfigError
from dattn_mcore.models.dattn import DattnModel
from dattn_mcore.models.initialize import initialize_entries
from dattn_mcore.parallel import platform

logger = logging.getLogger(__name__)

# Settings of the model that shape no parameter and may differ from the checkpoint's.
_FREE = {
    "llm": {"init_std"},
    "vision": {"init_std"},
    "projector": {"output_norm_init"},
}

# Besides the data set, the seed and the number of packs.
_FULL_STEPS_DEPEND_ON = (
    "text_budget",
    "visual_budget",
    "over_budget",
    "image_policy",
    "anyres_grids",
)


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


def check_same_model(
    config: Config, manifest: dict[str, Any], folder: Path, *, for_videos: bool = False
) -> None:
    """Refuses a checkpoint whose model differs from the configured one.

    Args:
        config: of the run.
        manifest: of the checkpoint.
        folder: of the checkpoint.
        for_videos: a model of images will do where the configured one takes videos too.

    Raises:
        CheckpointError: names the first setting that differs.
    """
    try:
        saved = saved_config(manifest["config"])
    except ConfigError as error:
        raise CheckpointError(
            f"{folder} is of another release: {error}; use the release that wrote it"
        ) from None
    ours, theirs = to_dict(config)["model"], to_dict(saved)["model"]
    if for_videos and not saved.model.video.enabled:
        theirs["video"] = ours["video"]
    for section, value in ours.items():
        pairs = value.items() if isinstance(value, dict) else [(None, value)]
        for key, want in pairs:
            have = theirs.get(section)
            have = have.get(key) if key is not None and isinstance(have, dict) else have
            if have != want and key not in _FREE.get(section, ()):
                name = ".".join(part for part in ("model", section, key) if part)
                raise CheckpointError(
                    f"{folder} holds another model: {name} is {have!r} there and {want!r} here; "
                    "use its own configuration or another checkpoint"
                )


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


def check_same_run(
    config: Config, manifest: dict[str, Any], folder: Path, data_identity: dict[str, Any]
) -> None:
    """Refuses to go on from a checkpoint of another model, data set or stage.

    Raises:
        CheckpointError: names what differs.
    """
    check_same_model(config, manifest, folder)
    check_same_adapters(config, manifest, folder)
    if not is_of_a_run(manifest):
        raise CheckpointError(
            f"{folder} holds converted weights without a step to go on from; start in another "
            "log.run_dir with checkpoint.init_from"
        )
    if not same_samples(manifest, data_identity):
        changed = difference(manifest.get("data", data_identity), data_identity)
        raise CheckpointError(
            f"{folder} was trained on other data{f' ({changed})' if changed else ''}, so its "
            "position means nothing here; restore it, or start in another log.run_dir with "
            "checkpoint.init_from"
        )
    _check_same_images(manifest, folder, data_identity)
    # With these and the fingerprint above, the step says which samples were seen.
    names = [("train", "seed"), ("train", "global_batch_size"), ("data", "step_packs_multiple")]
    if config.data.step_packs_multiple is not None:
        names += [("data", name) for name in _FULL_STEPS_DEPEND_ON]
    here = to_dict(config)
    for section, name in names:
        have, want = manifest["config"][section].get(name), here[section][name]
        if have != want:
            raise CheckpointError(
                f"{folder} was trained with {section}.{name}={have}, here it is {want}: its "
                "step would mean other samples; keep it, or start in another log.run_dir with "
                "checkpoint.init_from"
            )
    _check_same_parameters(config, manifest, folder)


def _check_same_parameters(config: Config, manifest: dict[str, Any], folder: Path) -> None:
    """Refuses to go on where other parameters would learn: they have no optimizer states there.

    Raises:
        CheckpointError: names what differs.
    """
    saved = saved_config(manifest["config"])
    there, here = resolved(saved), resolved(config)
    other = next((tensor for tensor in here if here[tensor].trains != there[tensor].trains), None)
    if other is None:
        return
    new_stage = "start the new stage in another log.run_dir with checkpoint.init_from"
    if not (saved.optim.groups or config.optim.groups):
        raise CheckpointError(
            f"{folder} trains {list(saved.train.trains)} and this run {list(config.train.trains)} "
            f"(train.trains); {new_stage}"
        )
    (key, layer), learns = other, here[other].trains
    place = "" if layer is None else f" of layer {layer}"
    raise CheckpointError(
        f"{folder} {'does not train' if learns else 'trains'} {key}{place} and this run "
        f"{'does' if learns else 'does not'} (train.trains, optim.groups); {new_stage}"
    )


def _check_same_images(
    manifest: dict[str, Any], folder: Path, data_identity: dict[str, Any]
) -> None:
    """Refuses to go on where images would become other pixels.

    Raises:
        CheckpointError: names the settings that keep what the checkpoint was trained with.
    """
    changes = image_changes(manifest, data_identity)
    if not changes:
        return
    # Strings as a user types them, all else as YAML reads it.
    old, new = (
        " ".join(
            f"{name}={pair[side] if isinstance(pair[side], str) else json.dumps(pair[side])}"
            for name, pair in changes.items()
        ).replace(", ", ",")
        for side in (0, 1)
    )
    raise CheckpointError(
        f"{folder} was trained with {old}, here it is {new}: its images would become other pixels; "
        f"add {old} to go on, or start in another log.run_dir with checkpoint.init_from"
    )


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
