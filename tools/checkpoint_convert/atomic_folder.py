"""Output that is whole or not there."""

from __future__ import annotations

import glob
import logging
import os
import shutil
from pathlib import Path

from dattn_mcore.errors import CheckpointError

logger = logging.getLogger(__name__)


def check_free(path: str | Path) -> None:
    """Checks that an output's name is not taken; a link that points nowhere takes it, too.

    Raises:
        CheckpointError: it is.
    """
    if os.path.lexists(path):
        what = "exists" if os.path.exists(path) else "is a link that points nowhere"
        raise CheckpointError(f"{path} {what}; give another output folder or remove it")


class AtomicFolder:
    """A folder that appears under its name only when the block ends without an error.

    Raises:
        CheckpointError: on entry, if the name is taken or cannot be made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.temporary = self.path.parent / f".{self.path.name}.{os.getpid()}.tmp"

    def __enter__(self) -> Path:
        check_free(self.path)
        for left in sorted(self.path.parent.glob(f".{glob.escape(self.path.name)}.*.tmp")):
            logger.warning("%s was left by a conversion that was killed, or still runs", left)
        try:
            self.temporary.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be made ({error.strerror})") from None
        return self.temporary

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        try:
            if kind is None:
                self.temporary.rename(self.path)
        except OSError as renaming:
            error = renaming
        shutil.rmtree(self.temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(
                f"{self.path} cannot be written ({error.strerror or error}); free space or choose "
                "another place"
            ) from None
