"""What the data path hands to the model: packed micro-batches and the global batch around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dattn_mcore.data.sample_failure import SampleFailure
from dattn_mcore.types import Layout, VisualShape

if TYPE_CHECKING:  # importing torch takes seconds, and making an index needs none of it
    from torch import Tensor


@dataclass
class MicroBatch:
    """One packed micro-batch of one data-parallel rank. Nothing in it is padded.

    Attributes:
        layouts: One layout per sample; of a sample with branches one per branch, next to each
            other, and so in all that runs along `layouts`: the branches share the sample's images
            by `images_of`, have its id, number, group and weight, and do not see each other.
            Visual rows of the pack stand in the order of samples,
            then of images in the sample; those of samples that share images once.
        text_ids: int64 [T], text rows of all samples, concatenated, without image placeholders.
        labels: int64 [T], already shifted inside each sample: the id that row i must predict,
            -100 where there is no loss (always so on the last row of a sample).
        num_tiles: Tiles of the pack, known on every rank. A tile has
            (image_size // patch_size) ** 2 rows.
        tiles: uint8 [own tiles, 3, image_size, image_size] RGB, not normalised; of each image the
            base view first, then the tiles of its canvas, row by row. Of these all `num_tiles`, or
            where context parallel ranks divide a pack those of this rank alone, of which there may
            be none (`RankShare.own_tiles`). None on ranks that need no pixels, and where num_tiles
            is 0.
        sample_ids: Annotation id of each sample.
        num_samples: Number of samples, whatever branches they have; 0 for the empty packs that
            fill up a global batch.
        items: Shape of each image and video of the pack, on every rank. An image's visual rows are
            those of its base view, then those of its canvas, both row-major; a video's go frame by
            frame. Empty: every tile is an image of its own.
        samples: Number of each sample in the index, where there is one.
        groups: Group of each sample, whose loss is counted apart; empty: none is.
        num_groups: How many groups the data set has; 0: its samples have none.
        images_of: For each sample the number of its visual unit, the images that it shows: equal
            for samples that show the same ones in the same order, by first appearance;
            `types.NO_IMAGES` for a sample of text alone. Tiles and `items` hold a unit
            once, in the order of the numbers. Empty: every sample has its own.
        weights: What the loss of each sample's tokens counts; empty: 1 each.
    """

    layouts: tuple[Layout, ...]
    text_ids: Tensor
    labels: Tensor
    num_tiles: int
    tiles: Tensor | None
    sample_ids: tuple[str, ...]
    num_samples: int
    items: tuple[VisualShape, ...] = ()
    samples: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    num_groups: int = 0
    images_of: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass
class GlobalBatch:
    """One optimizer step of data, as one data-parallel rank sees it.

    Attributes:
        step: 0-based optimizer step.
        microbatches: This rank's packs. The same count on every rank, a multiple of the
            pipeline's `microbatch_multiple`.
        samples: Numbers in the index of all samples of the step, in order, skipped ones included;
            same on every rank.
        sample_ids: Annotation ids of these.
        skipped: Samples that fit no micro-batch and were left out; same on every rank.
        truncated: Ids whose text was cut at the end to fit; same on every rank.
        failures: Samples of this rank's packs that could not be read or decoded here, where the
            ranks that divide a pack decode other images. They keep their shapes; every rank that
            holds one must `mask` it.
        text_tokens: Text rows of all samples that take part; same on every rank.
        visual_tokens: Visual rows that are computed for those samples; same on every rank.
    """

    step: int
    microbatches: list[MicroBatch]
    samples: tuple[int, ...]
    sample_ids: tuple[str, ...]
    skipped: tuple[SampleFailure, ...]
    truncated: tuple[str, ...]
    failures: tuple[SampleFailure, ...]
    text_tokens: int
    visual_tokens: int
