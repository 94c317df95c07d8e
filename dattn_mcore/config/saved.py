"""Configurations that a checkpoint keeps: what is not in them means what it meant back then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dattn_mcore.config.load import from_dict, merge
from dattn_mcore.config.schema import Config

# Settings that came later, with what runs did before there was a choice.
BEFORE: dict[str, dict[str, Any]] = {
    "data": {
        "apply_orientation": False,
        "transparency": "white",
        "anyres_ties": "first",
        "share_images": False,
    },
}


def with_old_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A saved tree of settings, completed by what later settings were without a name."""
    return merge(BEFORE, tree)


def saved_config(tree: Mapping[str, Any]) -> Config:
    """The configuration that a checkpoint was written with.

    Raises:
        ConfigError: an unknown key, or a value of wrong type.
    """
    return from_dict(with_old_settings(tree))
