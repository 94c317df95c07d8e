"""New code and processor settings for an export of an older release; its weights stay."""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer

import dattn_mcore.hf
from dattn_mcore.errors import CheckpointError
from dattn_mcore.hf import NO_FOREIGN_CODE, REMOTE_CODE_FILES, DattnProcessor
from dattn_mcore.types import IMAGE_MARK
from tools.checkpoint_convert.configs import records, understanding, with_features
from tools.checkpoint_convert.hf_to_mcore import image_settings
from tools.checkpoint_convert.inspect_path import inspect
from tools.checkpoint_convert.raw_folders import read_json
from tools.checkpoint_convert.tokenizers_out import PROCESSOR, image_processor, save_processor

CONFIG = "config.json"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def refresh(folder: str | Path) -> list[str]:
    """Gives an export the code, the processor settings and the records of this release.

    Weights, tokenizer, chat template and generation settings are not touched. All new files are
    written beside the old ones before the first takes its place.

    Args:
        folder: exported folder.

    Returns:
        One line for each file that changed; none if the folder was up to date.

    Raises:
        CheckpointError: the folder is no export, is damaged, is of a newer release, or cannot be
            written.
    """
    folder = Path(folder)
    old = read_json(folder / CONFIG)
    if old.get("model_type") != "dattn":
        raise CheckpointError(
            f"{folder / CONFIG}: model_type is {old.get('model_type')!r}; it must be 'dattn': give "
            "a folder that mcore-to-hf wrote"
        )
    _check_not_newer(folder, old)
    model = inspect(folder).model
    new = {
        name: (Path(dattn_mcore.hf.__path__[0]) / name).read_bytes() for name in REMOTE_CODE_FILES
    }
    new[PROCESSOR] = _processor(folder, model)
    # The last one to change: a folder whose config names a release has all files of it.
    version = {"transformers_version": transformers.__version__}
    new[CONFIG] = _json(with_features(old) | records() | version)
    lines = {}
    for name, data in new.items():
        line = _difference(folder / name, data)
        if line is not None:
            lines[name] = f"{name}: {line}"
    _replace(folder, {name: new[name] for name in lines})
    return list(lines.values())


def _check_not_newer(folder: Path, config: dict[str, Any]) -> None:
    """Raises CheckpointError where a later release of this package wrote the folder."""
    recorded = str(config.get("dattn_mcore_version", "0"))
    theirs, ours = (
        [int(number) for number in re.findall(r"\d+", version)]
        for version in (recorded, dattn_mcore.__version__)
    )
    if not theirs or theirs > ours:
        raise CheckpointError(
            f"{folder / CONFIG}: dattn_mcore_version is {recorded!r}, this is dattn_mcore "
            f"{dattn_mcore.__version__}; refresh the folder with a release that is as new"
        )


def _processor(folder: Path, model: Any) -> bytes:
    """processor_config.json as this release writes it for the folder's image settings."""
    with understanding(folder / "tokenizer_config.json"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **NO_FOREIGN_CODE)
    processor = DattnProcessor(
        image_processor(model, image_settings(folder)), tokenizer, image_token=IMAGE_MARK
    )
    with tempfile.TemporaryDirectory() as temporary:
        save_processor(Path(temporary), processor)
        return (Path(temporary) / PROCESSOR).read_bytes()


def _json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


def _difference(file: Path, data: bytes) -> str | None:
    """What of a file will be new; None: nothing, JSON with other blanks included."""
    if not file.is_file():
        return "added"
    before = file.read_bytes()
    if before == data:
        return None
    if file.suffix != ".json":
        return "renewed"
    old, new = read_json(file), json.loads(data)
    if old == new:
        return None
    changes = []
    for name in sorted(old.keys() | new.keys()):
        left, right = (json.dumps(fields.get(name)) for fields in (old, new))
        if left != right:
            changes.append(f"{name} {left} -> {right}" if len(left + right) < 80 else name)
    return ", ".join(changes)


def _replace(folder: Path, files: dict[str, bytes]) -> None:
    """Puts new files in the place of old ones, all or none of them.

    A disk that is full, or a signal, finds the old files in place. Only a kill in between the
    renames leaves some new and some old ones; the next refresh completes them.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    waiting = {name: folder / f".{name}.refresh.tmp" for name in files}
    try:
        for name, data in files.items():
            with waiting[name].open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        with _signals_wait():
            for name, temporary in waiting.items():
                temporary.replace(folder / name)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error.strerror or error}); free space or copy it to "
            "where you may write"
        ) from None
    finally:
        for temporary in waiting.values():
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Lets what would end the process come after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
