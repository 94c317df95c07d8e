"""Whether a checkpoint is of the configured model, and of this run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dattn_mcore.checkpoint.adapters import check_same_adapters
from dattn_mcore.checkpoint.manifest import is_of_a_run
from dattn_mcore.config.load import to_dict
from dattn_mcore.config.optim_groups import resolved
from dattn_mcore.config.saved import saved_config
from dattn_mcore.config.schema import Config
from dattn_mcore.data.index.identity import difference, image_changes, same_samples
from dattn_mcore.errors import CheckpointError, ConfigError

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
