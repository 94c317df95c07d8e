"""The folder of a run: which model and decoding its answers come from, and one run at a time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import platform as machine
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import dattn_mcore
from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.files import read_object, write_text

logger = logging.getLogger(__name__)

WHOLE_BYTES = 64 * 2**20
SAMPLES, SAMPLE_BYTES = 16, 2**20


def model_fingerprint(folder: Path) -> str:
    """A hash over the files of a model folder; of large ones, over size and samples.

    Args:
        folder: exported model folder.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= WHOLE_BYTES:
                digest.update(file.read())
                continue
            for sample in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


class RunFolder:
    """Where a run keeps answers, submissions, reviews, details, scores and its report.

    Args:
        path: the folder; made where it is absent.

    Raises:
        DataError: it cannot be made, or another run writes into it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers = path / "answers"
        self.submissions = path / "submissions"
        self.reviews = path / "reviews"
        self.details = path / "details"
        self.run_file = path / "run.json"
        self.scores = path / "scores.json"
        self.report = path / "report.html"
        self.lock: IO[str] | None = None

    def claim(self, identity: dict[str, Any]) -> None:
        """Keeps other runs out, and sees that the folder is free or of the same identity.

        Args:
            identity: what all answers of the folder have in common: model and decoding.

        Raises:
            DataError: another run is writing, or its answers come from another model or decoding.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise DataError(f"--out {self.path} cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"--out {self.path} is being written by another run; wait, or give another folder"
            ) from None
        except OSError as error:  # some network file systems have no locks
            logger.warning(
                "--out %s cannot be locked (%s); see that no other run writes into it",
                self.path,
                error.strerror,
            )
        if self.run_file.is_file():
            earlier = read_object(self.run_file, "run file")
            for key, value in identity.items():
                if earlier.get(key) != value:
                    raise DataError(
                        f"--out {self.path} holds answers with {key} {earlier.get(key)!r}, this "
                        f"run has {value!r}; give another --out"
                    )

    def settle(self, identity: dict[str, Any]) -> None:
        """Makes the folder this identity's; only once its model is loaded, lest a wrong one stays.

        Raises:
            DataError: it cannot be written.
        """
        if not self.run_file.is_file():
            write_text(self.run_file, json.dumps(identity, indent=2) + "\n", "run file")


def versions() -> dict[str, str]:
    """Versions of what the scores depend on."""
    found = {"dattn_mcore": dattn_mcore.__version__, "python": machine.python_version()}
    for name in ("torch", "transformers", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
