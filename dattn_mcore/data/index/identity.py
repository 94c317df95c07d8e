"""What the order and content of samples depend on: equal on all ranks, and from start to resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dattn_mcore.config.load import from_dict
from dattn_mcore.config.saved import with_old_settings
from dattn_mcore.config.schema import DataConfig, ValidationConfig
from dattn_mcore.data.image_rules import rules_of
from dattn_mcore.data.index.layout import digest
from dattn_mcore.data.index.store import Index
from dattn_mcore.data.tiles import ANYRES_POLICIES

_SETTINGS = {
    "weights": "data.sources[].weight",
    "tokenizer": "data.tokenizer",
    "template": "data.template",
}
_ONCE = ("llava", "webdataset")  # forms of before there were others


def identity_of(
    index: Index,
    data: DataConfig,
    validation: ValidationConfig | None = None,
    *,
    cut_rows: bool = False,
) -> dict[str, Any]:
    """Plain values that tell one data set from another: digests, settings, counts.

    Args:
        index: Of the data set.
        data: How it is read.
        validation: What is split off from it.
        cut_rows: Whether steps depend on how the rows of cut samples are counted
            (`budgets.Fates.counted_otherwise`).
    """
    settings = index.settings
    split: dict[str, Any] = {}
    if validation is not None and validation.share:  # without one, as it was before there was any
        split = {"held_out": {"share": validation.share, "salt": validation.salt}}
    # Likewise: once all records were of LLaVA's form and all answers learned.
    if settings.loss_on != "all":
        split["loss_on"] = settings.loss_on
    if any(source.form not in _ONCE for source in settings.sources):
        split["forms"] = [
            asdict(source.mapping) if source.form == "mapping" else source.form
            for source in settings.sources
        ]
    return {
        "content": index.content["content"],
        "usable": index.content["usable"],
        "weights": [source.weight for source in settings.sources],
        "tokenizer": settings.tokenizer_fingerprint,
        "template": settings.template,
        "num_samples": len(index),
        "num_usable": index.num_usable,
        "images": image_settings_of(data),
        **split,
        **({"group_images": True} if data.group_images else {}),
        **({"cut_rows": "those that are left"} if cut_rows else {}),
    }


def image_settings_of(data: DataConfig) -> dict[str, Any]:
    """What the pixels of an image depend on, by the names of the settings in `data`."""
    grids = data.anyres_grids if data.image_policy in ANYRES_POLICIES else ()
    return {
        "image_policy": data.image_policy,
        "anyres_grids": [list(grid) for grid in grids],
        "image_mean": list(data.image_mean),
        "image_std": list(data.image_std),
        **asdict(rules_of(data)),
    }


def fingerprint_of(identity: Mapping[str, Any]) -> str:
    """SHA-256 of an identity; the counts follow from the rest."""
    counted = ("num_samples", "num_usable")
    return digest({name: value for name, value in identity.items() if name not in counted})


def same_samples(manifest: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was trained on these samples, whatever it did with their images.

    Args:
        manifest: Of the checkpoint.
        here: Identity of this run.
    """
    there = manifest.get("data", {}).get("images")
    samples = {name: value for name, value in here.items() if name != "images"}
    # Once, image settings were no part of the fingerprint.
    kept = samples if there is None else {**samples, "images": there}
    return bool(manifest["data_fingerprint"] == fingerprint_of(kept))


def image_changes(
    manifest: Mapping[str, Any], here: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Image settings in which a checkpoint differs from this run: (there, here) by name.

    A checkpoint of before image settings were part of its identity has them in the configuration
    beside it; settings that this does not have either are those of runs back then.
    """
    there, new = manifest.get("data", {}).get("images"), here["images"]
    if there is None:
        saved = with_old_settings(manifest["config"])["data"]
        tree = {name: saved[name] for name in new if name in saved}
        there = image_settings_of(from_dict({"data": tree}).data)
    names = dict.fromkeys([*new, *there])
    pairs = {f"data.{name}": (there.get(name), new.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What tells the samples of two identities apart, in words; empty where nothing does."""
    parts = []
    if there["content"] != here["content"]:
        counts = f"{there['num_samples']:,} samples there, {here['num_samples']:,} here"
        parts.append(f"the annotations ({counts})")
    elif there["usable"] != here["usable"]:
        counts = f"{there['num_usable']:,} there, {here['num_usable']:,} here"
        parts.append(f"which samples are usable ({counts})")
    if there.get("held_out") != here.get("held_out"):
        parts.append("what is held out (validation.share, validation.salt)")
    if there.get("group_images") != here.get("group_images"):
        parts.append("the order of samples (data.group_images)")
    if there.get("cut_rows") != here.get("cut_rows"):
        parts.append(
            "which samples a step takes: with data.over_budget=truncate and "
            "data.step_packs_multiple a sample now counts the rows that are left of it"
        )
    if there.get("loss_on") != here.get("loss_on"):
        parts.append("which answers are learned (data.loss_on)")
    if there.get("forms") != here.get("forms"):
        parts.append("the form of records (data.sources[].format, data.sources[].mapping)")
    parts += [words for name, words in _SETTINGS.items() if there[name] != here[name]]
    return ", ".join(parts)
