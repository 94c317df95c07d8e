"""Opens the images of questions, and refuses what is missing, damaged or outside the folder."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from dattn_mcore.data.image_signatures import START, is_known, why_no_header, why_no_reader
from dattn_mcore.errors import DataError
from dattn_mcore.hf.image_rules_dattn import OLD_RULES, ImageRules, to_rgb

MAX_PIXELS = 100_000_000
SEEN = ImageRules()  # images as people see them
# How files begin: JPEG, PNG, GIF, BMP, TIFF.
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")


def check_images(folder: str | Path, paths: list[tuple[str, str]]) -> Path:
    """Checks that every image is there before anything slow begins.

    Args:
        folder: image folder.
        paths: (who asks, path below the folder) for every image.

    Returns:
        The resolved folder.

    Raises:
        DataError: naming the first image that is missing or outside the folder.
    """
    root = Path(folder).resolve()
    if paths and not root.is_dir():
        raise DataError(f"--image-folder {folder} is no folder; give the one image paths start in")
    for who, path in paths:
        file = (root / path).resolve()
        if not file.is_relative_to(root):
            raise DataError(f"{who}: image {path!r} is outside {folder}; paths must stay inside")
        if not file.is_file():
            raise DataError(f"{who}: image {path!r} is not in {folder}")
    return root


def rules_of_processor(image_processor: Any) -> ImageRules:
    """The image rules that an exported processor names, or those of before they were named."""
    names = asdict(OLD_RULES)
    return ImageRules(**{name: getattr(image_processor, name, old) for name, old in names.items()})


@dataclass(frozen=True)
class Picture:
    """An image that a question shows, not yet decoded.

    Attributes:
        name: what messages and reports call it: a path below the image folder, or a row's id.
        source: a file, encoded bytes, or base64 text.
    """

    name: str
    source: Path | bytes | str

    @property
    def key(self) -> Path | bytes | str:
        """The same for the same image, as far as its source says so."""
        return self.source

    def exists(self) -> bool:
        """Whether its file is there; encoded images always are."""
        return not isinstance(self.source, Path) or self.source.is_file()

    def fault(self) -> str:
        """Why it can be no image, by its first bytes; empty where it may be, or is not there."""
        try:
            file = self._file()
            with file.open("rb") if isinstance(file, Path) else file as opened:
                start = opened.read(START)
                if not start:
                    return "is empty"
                if (why := why_no_reader(start)) is not None:
                    return why
                if not start.startswith(_BEGINNINGS):
                    opened.seek(0)
                    Image.open(opened)  # the rarer formats; reads the header alone
        except FileNotFoundError:
            return ""
        except UnidentifiedImageError:
            return f"begins with {start[:16]!r}"
        except Exception as error:  # as in `open`
            return f"cannot be read ({' '.join(str(error).split()) or type(error).__name__})"
        return ""

    def open(self, who: str, rules: ImageRules = SEEN) -> Image.Image:
        """Decodes the first frame as RGB.

        Args:
            who: who asks, for messages.
            rules: of the model that is shown it; without them, as people see it.

        Raises:
            DataError: it is missing, no image, truncated, or too large.
        """
        try:
            with self._opened(who) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(
                        f"{who}: image {self.name!r} has {image.width} x {image.height} pixels; at "
                        f"most {MAX_PIXELS} are decoded"
                    )
                return to_rgb(image, rules)
        except DataError:
            raise
        except FileNotFoundError:
            raise DataError(f"{who}: image {self.name!r} is not there") from None
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{who}: image {self.name!r} cannot be decoded ({reason})") from None

    @contextlib.contextmanager
    def _opened(self, who: str) -> Iterator[Image.Image]:
        """The image, its pixels not read."""
        file = self._file()
        with file.open("rb") if isinstance(file, Path) else file as opened:
            start = opened.read(START)
            why = why_no_reader(start)
            opened.seek(0)
            if why is None:
                try:
                    with Image.open(opened) as image:
                        yield image
                    return
                except UnidentifiedImageError as error:
                    why = f"cannot be decoded (it begins with {start[:8]!r})"
                    if is_known(start):
                        why = why_no_header(opened, error)
            raise DataError(f"{who}: image {self.name!r} {why}")

    def _file(self) -> Path | io.BytesIO:
        if isinstance(self.source, Path):
            return self.source
        raw = base64.b64decode(self.source) if isinstance(self.source, str) else self.source
        return io.BytesIO(raw)
