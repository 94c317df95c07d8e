"""What several parts of the package share and none of them owns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

# (is_visual, rows) of each run of a sample, in reading order.
Layout = tuple[tuple[bool, int], ...]

NO_IMAGES = -1  # in the place of a unit's number: a sample of text alone


def visual_units(layouts: Iterable[Layout], images_of: Sequence[int] = ()) -> tuple[int, ...]:
    """Visual rows of each visual unit of a pack: the images that one or several samples show.

    Args:
        layouts: runs of each sample, in reading order.
        images_of: for each sample the number of its unit, `NO_IMAGES` for text alone; numbers go by
            first appearance. Empty: each sample is a unit of its own, one of text alone as well.

    Raises:
        ValueError: samples of one unit have different numbers of visual rows, or the numbers are
            not as they must be.
    """
    visual = [sum(rows for is_visual, rows in layout if is_visual) for layout in layouts]
    if not images_of:
        return tuple(visual)
    units: list[int] = []
    for rows, unit in zip(visual, images_of, strict=True):
        if (unit == NO_IMAGES) != (rows == 0) or not NO_IMAGES <= unit <= len(units):
            raise ValueError(f"a sample of {rows} visual rows cannot be of unit {unit}")
        if unit == len(units):
            units.append(rows)
        elif unit != NO_IMAGES and units[unit] != rows:
            raise ValueError(f"unit {unit} has {units[unit]} visual rows, and {rows} in a sample")
    return tuple(units)


def tiles_of_rank(num_tiles: int, rank: int, ranks: int) -> range:
    """The tiles of a pack that a rank decodes and encodes.

    Consecutive tiles, as many for each rank as for any other, or one less.

    Args:
        num_tiles: of the whole pack.
        rank: among those that share it.
        ranks: how many do.
    """
    return range(rank * num_tiles // ranks, (rank + 1) * num_tiles // ranks)


@dataclass(frozen=True)
class Shards:
    """How many ranks divide the rows of a pack.

    Attributes:
        context: ranks of the context parallel group, which divide visual rows and text rows
            (`layers.context`).
        tensor: ranks of the tensor parallel group that divide those of a context parallel rank
            (sequence parallelism); 1 without it.
    """

    context: int = 1
    tensor: int = 1

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.context * self.tensor


@dataclass(frozen=True, slots=True)
class VisualShape:
    """How the tiles and visual rows of one image or one video lie.

    Attributes:
        grid: (columns, rows) of an image's AnyRes canvas in tiles; (0, 0): one tile, or a video.
        times: of each frame of a video, seconds from its start, rising; empty: an image.
        frame_side: of a video, cells along a side of a frame's grid of features before
            `model.projector.pool`; 0: an image, whose tiles keep all patches.
        duration: seconds of the video; 0: an image.
    """

    grid: tuple[int, int] = (0, 0)
    times: tuple[float, ...] = ()
    frame_side: int = 0
    duration: float = 0.0

    @property
    def num_tiles(self) -> int:
        """Tiles: the base view and those of the canvas, or a tile a frame."""
        return len(self.times) or 1 + self.grid[0] * self.grid[1]


def image_shapes(grids: Iterable[tuple[int, int]]) -> tuple[VisualShape, ...]:
    """Of images alone: one for each canvas, (columns, rows) in tiles, (0, 0) for one tile."""
    return tuple(VisualShape(grid=(columns, rows)) for columns, rows in grids)


# The label of a text row that has no loss, as in PyTorch's cross entropy and transformers.
IGNORED_LABEL = -100

# Stands for an image in annotations and questions, as LLaVA's files have it.
IMAGE_MARK = "<image>"

# Words that a setting may have.
V2V = Literal["diagonal", "causal"]
T2VPosition = Literal["none", "rope"]
Merge = Literal["alpha", "sum"]
TowerWork = Literal["tensor", "tiles"]
Implementation = Literal["local", "transformer_engine"]
Fp8Recipe = Literal["delayed", "tensorwise", "blockwise"]
RecomputeGranularity = Literal["none", "selective", "full"]
RecomputeModule = Literal["core_attn", "layernorm", "mlp"]
Part = Literal["vision", "projector", "llm"]  # of a model

# The benchmarks of the evaluation, by their names on the command line.
BenchmarkName = Literal[
    "scienceqa",
    "mme",
    "gqa",
    "pope",
    "textvqa",
    "seed",
    "llava-bench",
    "mm-vet",
    "vqav2",
    "mmbench",
    "vizwiz",
    "mmstar",
]
