"""The manifest of a checkpoint, `dattn.json`: written last, and checked before it is believed.

It carries the step, the layout, the resolved configuration, and size and SHA-256 of all other
files. Its own SHA-256 stands in it: of its bytes with zeros in that place. Manifests of format 1
have none; every field of theirs is checked for its type instead.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import dattn_mcore
from dattn_mcore.checkpoint.content import check_inside
from dattn_mcore.config.load import from_dict, to_dict
from dattn_mcore.config.schema import Config
from dattn_mcore.errors import CheckpointError, ConfigError

MANIFEST = "dattn.json"
FORMAT = 2
_NO_DIGEST = "0" * 64
_SHA256 = re.compile("[0-9a-f]{64}")
_ALWAYS = {"format", "step", "config", "files"}
_OF_A_RUN = {"layout", "data_fingerprint", "dattn_mcore"}
_LATER = {"data", "tokenizer"}  # not in the first manifests of format 1
_SINCE_2 = {"digest", "schedule_steps"}
_OPTIONAL = {"metrics", "hooks"}  # not in the first manifests of format 2
_OF_ADAPTERS = {"base"}  # only where a checkpoint needs the weights of another


class _Damaged(Exception):
    """Says which field is wrong."""


def new_manifest(
    config: Config,
    step: int,
    tokenizer: dict[str, Any],
    layout: tuple[int, int] | None = None,
    data: dict[str, Any] | None = None,
    data_fingerprint: str | None = None,
    schedule_steps: int | None = None,
    metrics: dict[str, float] | None = None,
    hooks: dict[str, Any] | None = None,
    base: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The fields of a manifest, without files.

    Args:
        config: of the run.
        step: optimizer steps done; also the position in the data.
        tokenizer: from `describe_tokenizer`.
        layout: (pp, tp) that it was saved in; None for converted weights, as all below.
        data: identity of the data set.
        data_fingerprint: of that identity.
        schedule_steps: steps that the learning rate's schedule takes.
        metrics: newest value of each metric that the run measures beside its training loss; those
            that are no finite number are left out, since they cannot be compared.
        hooks: what the run's hooks remember over a resume, by name.
        base: of a checkpoint that holds adapters, from `checkpoint.adapters.describe_base`.
    """
    finite = {name: float(v) for name, v in (metrics or {}).items() if math.isfinite(v)}
    fields = {
        "format": FORMAT,
        "digest": _NO_DIGEST,
        "step": step,
        "layout": list(layout) if layout else None,
        "data_fingerprint": data_fingerprint,
        "data": data,
        "schedule_steps": schedule_steps,
        **({"hooks": hooks} if hooks else {}),
        "tokenizer": tokenizer,
        **({"metrics": finite} if finite else {}),
        "dattn_mcore": dattn_mcore.__version__,
        "config": to_dict(config),
    }
    return fields if base is None else {**fields, "base": base}


def write_manifest(folder: Path, fields: dict[str, Any], files: dict[str, list[Any]]) -> None:
    """Makes a checkpoint whole.

    Args:
        folder: of the checkpoint.
        fields: from `new_manifest`.
        files: size and SHA-256 of all other files, by name.
    """
    text = json.dumps({**fields, "digest": _NO_DIGEST, "files": files}, indent=1) + "\n"
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    sealed = text.replace(_quoted(_NO_DIGEST), _quoted(sha256), 1)
    (folder / MANIFEST).write_text(sealed, encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a checkpoint, and checks everything that can be checked in it alone.

    Raises:
        CheckpointError: it is missing or damaged, or of another step than its folder.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except OSError:
        raise CheckpointError(
            f"{folder} is no checkpoint (no {MANIFEST}); name a folder step_... of a run"
        ) from None
    try:
        fields = _parse(content)
        _check_digest(content, fields)
        _check_fields(fields, path)
    except _Damaged as damaged:
        raise CheckpointError(f"{path} is damaged ({damaged}); use another checkpoint") from None
    if is_of_a_run(fields) and (named := step_of(folder)) not in (None, fields["step"]):
        raise CheckpointError(
            f"{path} is damaged (of step {fields['step']}, in a folder of step {named}); use "
            "another checkpoint"
        )
    return fields


def is_of_a_run(manifest: dict[str, Any]) -> bool:
    """Whether a run saved the checkpoint; converted weights have no optimizer and no position."""
    return manifest.get("data_fingerprint") is not None


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return root / f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step that a folder's name says; None where a run would have named none so."""
    digits = folder.name.removeprefix("step_")
    step = int(digits) if digits.isascii() and digits.isdigit() else -1
    return step if folder.name == checkpoint_folder(folder.parent, step).name else None


def describe_tokenizer(config: Config, fingerprint: str | None = None) -> dict[str, Any]:
    """What a manifest says about the tokenizer, so that an export finds the same.

    Args:
        config: its `data.tokenizer` may be relative to the folder that the run was started in.
        fingerprint: of the tokenizer; None: it was not opened.
    """
    return {"path": str(Path(config.data.tokenizer).absolute()), "fingerprint": fingerprint}


def _quoted(sha256: str) -> str:
    return f'"digest": "{sha256}"'


def _parse(content: bytes) -> dict[str, Any]:
    def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError
        return dict(pairs)

    try:
        fields = json.loads(content.decode("utf-8"), object_pairs_hook=no_repeats)
    except (ValueError, RecursionError):
        raise _Damaged("no JSON") from None
    if not isinstance(fields, dict):
        raise _Damaged("no mapping")
    return fields


def _check_digest(content: bytes, fields: dict[str, Any]) -> None:
    number = fields.get("format")
    if number == 1 and type(number) is int and "digest" not in fields:
        return
    sha256 = fields.get("digest")
    place = _quoted(str(sha256)).encode()
    if not _is_sha256(sha256) or content.count(place) != 1:
        if type(number) is int and number > FORMAT:
            raise _Damaged(f"or of a later release: format {number}, known are 1 and {FORMAT}")
        raise _Damaged("no digest of its own")
    blank = content.replace(place, _quoted(_NO_DIGEST).encode())
    if hashlib.sha256(blank).hexdigest() != sha256:
        raise _Damaged("its own SHA-256 differs")
    if type(number) is not int or number != FORMAT:
        raise _Damaged(f"or of a later release: format {number!r}, known are 1 and {FORMAT}")


def _check_fields(fields: dict[str, Any], path: Path) -> None:
    """Names and types; in format 1 the types of the settings as well."""
    known = _ALWAYS | _OF_A_RUN | _LATER
    needed = set(_ALWAYS)
    if fields["format"] == 1:
        needed |= _OF_A_RUN if _OF_A_RUN & fields.keys() else set()
    else:
        known |= _SINCE_2
        needed = known
        known = known | _OPTIONAL | _OF_ADAPTERS
    for name in sorted(needed - fields.keys()):
        raise _Damaged(f"no {name}")
    for name in sorted(fields.keys() - known):
        raise _Damaged(f"unknown field {name!r}")
    _check_values(fields)
    _check_files(fields["files"], path)
    config = fields["config"]
    for section in ("model", "data", "train"):
        if not isinstance(config, dict) or not isinstance(config.get(section), dict):
            raise _Damaged(f"no settings of {section}")
    if fields["format"] == 1:
        try:
            from_dict(config)
        except ConfigError as error:
            raise _Damaged(str(error)) from None


def _check_values(fields: dict[str, Any]) -> None:
    if not _is_count(fields["step"]):
        raise _Damaged(f"step {fields['step']!r}")
    layout, of_a_run = fields.get("layout"), is_of_a_run(fields)
    sizes = layout if isinstance(layout, list) else []
    right = len(sizes) == 2 and all(_is_count(size) and size > 0 for size in sizes)
    if right != of_a_run or (layout is not None and not of_a_run):
        raise _Damaged(f"layout {layout!r}")
    if of_a_run and not isinstance(fields["data_fingerprint"], str):
        raise _Damaged("data_fingerprint is no text")
    steps = fields.get("schedule_steps")
    if steps is not None and not _is_count(steps):
        raise _Damaged(f"schedule_steps {steps!r}")
    for name in _LATER & fields.keys():
        if not isinstance(fields[name], dict) and (of_a_run or name != "data"):
            raise _Damaged(f"{name} is no mapping")
    metrics = fields.get("metrics", {})
    if not isinstance(metrics, dict) or not all(map(_is_finite, metrics.values())):
        raise _Damaged("metrics are no mapping of names to finite numbers")
    if not isinstance(fields.get("hooks", {}), dict):
        raise _Damaged("hooks is no mapping")
    base = fields.get("base", {"path": "", "fingerprint": ""})
    if not isinstance(base, dict) or base.keys() != {"path", "fingerprint"}:
        raise _Damaged("base is no path and fingerprint")
    if not all(isinstance(value, str) for value in base.values()):
        raise _Damaged("base is no text")
    tokenizer = fields.get("tokenizer", {})
    if not all(isinstance(value, str | None) for value in tokenizer.values()):
        raise _Damaged("tokenizer is no text")


def _check_files(files: Any, path: Path) -> None:
    if not isinstance(files, dict) or not files:
        raise _Damaged("no files")
    for name, entry in files.items():
        check_inside(name, path)
        whole = isinstance(entry, list) and len(entry) == 2
        if not (whole and _is_count(entry[0]) and _is_sha256(entry[1])):
            raise _Damaged(f"no size and SHA-256 of {name}")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_finite(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
