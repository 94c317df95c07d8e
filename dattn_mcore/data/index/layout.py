"""What an index holds: tables, names, and a list of what is unusable.

    index.json     what it was made from, and the metadata left aside; written last
    samples.npy    SAMPLE rows, one per record of the sources, in order
    images.npy     IMAGE rows, those of a sample next to each other
    usable.npy     one byte per sample
    branches.npy   BRANCH numbers, those of a sample next to each other; most samples have none
    names.bin      ids and image names, UTF-8
    bad.jsonl      one line per unusable sample: number, id, file, where, path, stage, reason

All are read through memory maps, so a trainer's memory does not grow with the data set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from dattn_mcore.config.schema import Config, LossOn
from dattn_mcore.data.image_rules import rules_of
from dattn_mcore.data.sources.configured import configured_sources
from dattn_mcore.data.sources.source import Source
from dattn_mcore.data.tiles import ANYRES_POLICIES
from dattn_mcore.data.tokenizer import Tokenizer
from dattn_mcore.hf.image_rules_dattn import ImageRules

VERSION = 8  # raise it when the same sources would give another index
NEVER = 2**32 - 1  # first_label of a sample without supervised text

SAMPLE = np.dtype(
    [
        ("offset", "<u8"),  # see sources.source.Place
        ("length", "<u4"),
        ("file", "<u4"),  # number over the files of all sources
        ("name_start", "<u8"),  # its id, in names.bin
        ("first_image", "<u8"),  # row of images.npy
        ("text_rows", "<u4"),
        ("first_label", "<u4"),  # first text row that has something to predict
        ("supervised", "<u4"),  # text rows that have
        ("name_length", "<u2"),
        ("num_images", "<u2"),
        ("num_tiles", "<u4"),
        ("kind", "u1"),  # see sources.place
        ("first_branch", "<u8"),  # number of branches.npy
        ("num_branches", "<u4"),  # 0: it is one text
    ]
)
IMAGE = np.dtype(
    [
        ("offset", "<u8"),  # see sources.source.ImagePlace
        ("name_start", "<u8"),
        ("length", "<u4"),
        ("width", "<u4"),  # after its orientation is applied
        ("height", "<u4"),
        ("text_before", "<u4"),  # text rows of the sample (its first branch) before the image
        ("num_tiles", "<u2"),
        ("name_length", "<u2"),
        ("columns", "u1"),  # of the AnyRes grid; 0 where the image is one square
        ("rows", "u1"),
        ("format", "u1"),  # place in FORMATS
        ("identity", "<u8"),  # see image_identity.ImageIdentity.digest
        ("content", "<u8", (2,)),  # of its bytes (data.hash_images); 0, 0 where they are not hashed
    ]
)
# Of each branch 1 + num_images numbers: its text rows, and those that stand before each image.
BRANCH = np.dtype("<u4")


# Columns that are written only where they say something: every touched page of a table is memory.
OF_BRANCHES, OF_BYTES = ("first_branch", "num_branches"), ("content",)


def without_columns(table: np.dtype, names: Collection[str]) -> np.dtype:
    """A table without some of its columns."""
    return np.dtype([field for field in table.descr if field[0] not in names])


class SampleRow(NamedTuple):
    """A row of SAMPLE before it is written: the fields of that table, in its order."""

    offset: int
    length: int
    file: int
    name_start: int
    first_image: int
    text_rows: int
    first_label: int
    supervised: int
    name_length: int
    num_images: int
    num_tiles: int
    kind: int
    first_branch: int
    num_branches: int


class ImageRow(NamedTuple):
    """A row of IMAGE before it is written: the fields of that table, in its order."""

    offset: int
    name_start: int
    length: int
    width: int
    height: int
    text_before: int
    num_tiles: int
    name_length: int
    columns: int
    rows: int
    format: int
    identity: int
    content: tuple[int, int]


FORMATS = (
    "OTHER",
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
    "JPEG2000",
    "PPM",
    "AVIF",
    "ICO",
    "MPO",
    "HEIF",
)


@dataclass(frozen=True)
class IndexSettings:
    """Everything an index depends on but the contents of files.

    Attributes:
        sources: Files and folders.
        tokenizer: Path of the tokenizer.
        tokenizer_fingerprint: SHA-256 of what defines it.
        template: Conversation template.
        policy: How an image becomes tiles.
        tile_size: Side of a tile in pixels.
        grids: Canvases that AnyRes may choose.
        max_pixels: Larger images are unusable.
        rules: Orientation, transparency and ties of canvases.
        loss_on: Which answers are learned.
        hash_images: Images are told apart by their bytes.
    """

    sources: tuple[Source, ...]
    tokenizer: str
    tokenizer_fingerprint: str
    template: str
    policy: str
    tile_size: int
    grids: tuple[tuple[int, int], ...]
    max_pixels: int
    rules: ImageRules
    loss_on: LossOn = "all"
    hash_images: bool = False

    @property
    def files(self) -> list[tuple[int, Source]]:
        """(number within its source, source) of every file."""
        return [(n, source) for source in self.sources for n in range(len(source.files))]

    @property
    def name(self) -> str:
        """Name of the index's folder; differs with any of the settings."""
        return f"{self.sources[0].files[0].stem}-{digest(self.as_json())[:12]}"

    def as_json(self) -> dict[str, Any]:
        """Plain values, without the weights, which an index does not depend on."""
        plain = asdict(self)
        for source in plain["sources"]:
            del source["weight"], source["unpack_folder"]
            source["files"] = [str(file) for file in source["files"]]
        # As JSON gives it back: lists, no tuples.
        return dict(json.loads(json.dumps({"version": VERSION, **plain})))


def settings_of(config: Config, tokenizer: Tokenizer) -> IndexSettings:
    """What the index of a configuration depends on.

    Raises:
        DataError: A source whose files are not there.
    """
    data = config.data
    return IndexSettings(
        sources=tuple(configured_sources(data)),
        tokenizer=data.tokenizer,
        tokenizer_fingerprint=tokenizer.fingerprint,
        template=data.template,
        policy=data.image_policy,
        tile_size=config.model.vision.image_size,
        grids=data.anyres_grids if data.image_policy in ANYRES_POLICIES else (),
        max_pixels=data.max_image_pixels,
        rules=rules_of(data),
        loss_on=data.loss_on,
        hash_images=data.hash_images,
    )


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
