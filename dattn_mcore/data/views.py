"""Which tiles each sample's images become, known before anything is decoded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from dattn_mcore.config.schema import Config
from dattn_mcore.data.annotations import Sample
from dattn_mcore.data.image_files import check_folder, read_image_size
from dattn_mcore.data.tiles import ANYRES_POLICIES, Grid, plan_tiles


class ViewPlanner:
    """Canvas grids of images. With AnyRes every rank reads each image's size from its header.

    Args:
        config: The run; `data` and `model.vision` are read.
        has_images: Whether any sample has an image (else the folder need not exist).

    Raises:
        DataError: AnyRes is on, and the image folder does not exist.
    """

    def __init__(self, config: Config, has_images: bool) -> None:
        self._data, self._tile_size = config.data, config.model.vision.image_size
        self._rows_per_tile = config.model.vision.rows_per_tile
        self._threads: ThreadPoolExecutor | None = None
        if has_images and config.data.image_policy in ANYRES_POLICIES:
            self._folder = check_folder(config.data.image_folder)
            self._threads = ThreadPoolExecutor(
                config.data.decode_threads, thread_name_prefix="sizes"
            )

    def grids(self, samples: list[Sample]) -> list[tuple[Grid, ...]]:
        """(columns, rows) of the canvas of every image of every sample; (0, 0) for one tile.

        Raises:
            DataError: The first image whose size cannot be read, by annotation id and path.
        """
        if self._threads is None:
            return [((0, 0),) * len(sample.images) for sample in samples]
        return list(self._threads.map(self._of_sample, samples))

    def rows(self, grid: Grid) -> int:
        """Visual rows of an image."""
        return self._rows_per_tile * (1 + grid[0] * grid[1])

    def close(self) -> None:
        """Ends the threads."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _of_sample(self, sample: Sample) -> tuple[Grid, ...]:
        data = self._data
        grids = []
        for path in sample.images:
            width, height = read_image_size(self._folder, path, sample.id, data.max_image_pixels)
            plan = plan_tiles(
                width,
                height,
                policy=data.image_policy,
                tile_size=self._tile_size,
                grids=data.anyres_grids,
            )
            grids.append(plan.grid)
        return tuple(grids)
