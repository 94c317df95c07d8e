"""What the order and content of samples depend on: equal on all ranks, and from start to resume."""

from __future__ import annotations

from typing import Any

from dattn_mcore.data.index.layout import digest
from dattn_mcore.data.index.store import Index

_SETTINGS = {
    "weights": "data.sources[].weight",
    "tokenizer": "data.tokenizer",
    "template": "data.template",
}


def identity_of(index: Index) -> dict[str, Any]:
    """Plain values that tell one data set from another: digests, settings, counts."""
    settings = index.settings
    return {
        "content": index.content["content"],
        "usable": index.content["usable"],
        "weights": [source.weight for source in settings.sources],
        "tokenizer": settings.tokenizer_fingerprint,
        "template": settings.template,
        "num_samples": len(index),
        "num_usable": index.num_usable,
    }


def fingerprint_of(identity: dict[str, Any]) -> str:
    """SHA-256 of an identity; the counts follow from the rest."""
    counted = ("num_samples", "num_usable")
    return digest({name: value for name, value in identity.items() if name not in counted})


def difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What tells two identities apart, in words; empty where nothing does."""
    parts = []
    if there["content"] != here["content"]:
        counts = f"{there['num_samples']:,} samples there, {here['num_samples']:,} here"
        parts.append(f"the annotations ({counts})")
    elif there["usable"] != here["usable"]:
        counts = f"{there['num_usable']:,} there, {here['num_usable']:,} here"
        parts.append(f"which samples are usable ({counts})")
    parts += [words for name, words in _SETTINGS.items() if there[name] != here[name]]
    return ", ".join(parts)
