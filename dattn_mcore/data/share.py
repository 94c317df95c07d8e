"""Which part of every global batch a rank takes."""

from __future__ import annotations

from dataclasses import dataclass

from dattn_mcore.types import tiles_of_rank


@dataclass(frozen=True)
class RankShare:
    """A rank's place among those that divide a batch, and where its images are decoded.

    Attributes:
        dp_rank: This rank's place in its data-parallel group.
        dp_size: Size of that group.
        microbatch_multiple: The count of micro-batches is a multiple of this (interleaved
            schedules want a multiple of pp).
        needs_pixels: Whether this rank runs the vision tower.
        image_device: `gpu` decodes on the GPU; `MicroBatch.tiles` then lie there.
        image_device_id: Index of that GPU.
        tile_rank: This rank's place among those that divide the tiles of a pack
            (`types.tiles_of_rank`): context parallel ranks. It opens only images of which it has a
            tile.
        tile_ranks: How many they are.
    """

    dp_rank: int
    dp_size: int
    microbatch_multiple: int
    needs_pixels: bool
    image_device: str = "cpu"
    image_device_id: int | None = None
    tile_rank: int = 0
    tile_ranks: int = 1

    def own_tiles(self, num_tiles: int) -> range:
        """Tiles of a pack of `num_tiles` that this rank decodes."""
        return tiles_of_rank(num_tiles, self.tile_rank, self.tile_ranks)

    @property
    def pack_multiple(self) -> int:
        """All ranks' packs of a batch are a multiple of it."""
        return self.dp_size * self.microbatch_multiple
