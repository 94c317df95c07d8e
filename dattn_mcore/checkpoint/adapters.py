"""Checkpoints of runs with adapters: they hold what learns, and name the checkpoint of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dattn_mcore.checkpoint.folders import digest
from dattn_mcore.checkpoint.manifest import MANIFEST
from dattn_mcore.config.lora import adapters_of
from dattn_mcore.config.saved import saved_config
from dattn_mcore.config.schema import Config
from dattn_mcore.errors import CheckpointError


def describe_base(folder: Path) -> dict[str, str]:
    """What a manifest says of the base: where it was, and SHA-256 of its manifest.

    The latter holds those of all its files.
    """
    return {"path": str(folder.absolute()), "fingerprint": digest(folder / MANIFEST)}


def has_base(manifest: dict[str, Any]) -> bool:
    """Whether a checkpoint holds adapters, beside the weights of a base."""
    return manifest.get("base") is not None


def check_base(manifest: dict[str, Any], folder: Path, base: Path, setting: str) -> None:
    """Refuses a base that a checkpoint's adapters have not learnt beside.

    Args:
        manifest: of the checkpoint.
        folder: of the checkpoint, for messages.
        base: folder of the checkpoint that is taken for its base.
        setting: that names it, for messages.

    Raises:
        CheckpointError: it is another one.
    """
    known = manifest["base"]
    if describe_base(base)["fingerprint"] != known["fingerprint"]:
        raise CheckpointError(
            f"{folder} holds adapters of {known['path']}, and {setting} leads to {base}, which "
            f"is another checkpoint; name the base that they learnt beside by {setting}"
        )


def check_same_adapters(config: Config, manifest: dict[str, Any], folder: Path) -> None:
    """Refuses to go on from a checkpoint with other adapters than the run has.

    Raises:
        CheckpointError: names what differs.
    """
    here = adapters_of(config)
    there = adapters_of(saved_config(manifest["config"])) if has_base(manifest) else None
    way_out = "keep it, or start in another log.run_dir"
    if (here is None) != (there is None):
        has = "has adapters" if here is None else "has no adapters"
        raise CheckpointError(
            f"{folder} {has} and this run {'none' if here is None else 'has'} (lora.targets); "
            f"{way_out}"
        )
    if here is None or there is None:
        return
    for name in ("rank", "alpha", "dora"):
        have, want = getattr(there, name), getattr(here, name)
        if have != want:
            raise CheckpointError(
                f"{folder} was trained with lora.{name}={have}, here it is {want}; {way_out}"
            )
    if here.targets != there.targets:
        name = sorted(here.targets ^ there.targets)[0]
        where = "there" if name in there.targets else "here"
        raise CheckpointError(
            f"{folder} was trained with other lora.targets: {name} has an adapter only {where}; "
            f"{way_out}"
        )
