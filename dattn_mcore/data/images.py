"""Image files to square uint8 tiles (one, or a base view and a canvas), whatever the decoder.

Decoding is DALI's or Pillow's; resizing is torch's antialiased bicubic on uint8 for both, which
follows Pillow's within two grey levels (DALI's own cubic resize is much further off). It works
along x, then along y, as Pillow did up to release 12; Pillow 13 starts with y where that is less
work, and differs from both by more than two levels in a few pixels. So a tile does not depend on
the backend wherever the decoders agree, and they agree bit for bit on what `suits_dali` lets DALI
decode.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from dattn_mcore.data.decode_dali import DaliDecoder
from dattn_mcore.data.decode_pillow import PillowDecoder
from dattn_mcore.data.image_files import ImageFile, check_folder, read_image_file
from dattn_mcore.data.tiles import ANYRES_POLICIES, POLICIES, Grid, plan_tiles
from dattn_mcore.errors import ConfigError, DataError

_LOG = logging.getLogger(__name__)
BACKENDS = ("auto", "dali", "pillow")
_said: set[str] = set()  # what `auto` chose is logged once a process


class Decoder(Protocol):
    """Decodes checked image files."""

    name: str

    def decode(self, images: Sequence[ImageFile]) -> list[Tensor]:
        """Returns uint8 [3, height, width] RGB for each image, or raises DataError."""

    def close(self) -> None:
        """Gives threads and memory back."""


def make_decoder(
    backend: str, threads: int, device: str = "cpu", device_id: int | None = None
) -> Decoder:
    """Chooses the decoder.

    Args:
        backend: `dali`, `pillow`, or `auto` (DALI where it is installed, else Pillow; said once).
        threads: Decoder threads.
        device: `cpu` or `gpu`; Pillow knows only the CPU.
        device_id: Index of the GPU.

    Raises:
        ConfigError: Unknown backend, or DALI asked for and absent.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"data.image_backend: '{backend}' is unknown; use {', '.join(BACKENDS)}")
    if backend == "pillow":
        return PillowDecoder(threads)
    try:
        decoder: Decoder = DaliDecoder(threads, device, device_id)
        why = "DALI is installed"
    except (ImportError, OSError) as error:  # OSError: a wheel whose libraries do not load
        if backend == "dali":
            raise ConfigError(
                "data.image_backend: 'dali' is not installed or does not load here "
                f"({error}); install the extra 'dali', or set data.image_backend=pillow"
            ) from None
        decoder = PillowDecoder(threads)
        why = f"DALI is not installed or does not load here: {error}"
    if backend == "auto" and decoder.name not in _said:
        _said.add(decoder.name)
        _LOG.info("images are decoded with %s (%s)", decoder.name, why)
    return decoder


class ImageLoader:
    """Loads images of one folder as tiles."""

    def __init__(
        self,
        folder: str | Path,
        *,
        size: int,
        policy: str = "stretch",
        grids: Sequence[Grid] = (),
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        backend: str = "auto",
        threads: int = 2,
        max_pixels: int = 100_000_000,
        device: str = "cpu",
        device_id: int | None = None,
    ) -> None:
        """Opens the folder and chooses the decoder.

        Args:
            folder: Image folder; nothing outside it is ever read.
            size: Side of a tile in pixels.
            policy: How an image becomes tiles (see `to_tiles`).
            grids: (columns, rows) of the canvases that AnyRes policies may choose.
            mean: Per-channel mean in 0..1; its colour fills the borders of `pad`.
            backend: `auto`, `dali` or `pillow`.
            threads: Threads that read and decode.
            max_pixels: Larger images are refused.
            device: Where DALI decodes: `cpu` or `gpu`.
            device_id: Index of the GPU.

        Raises:
            DataError: The folder does not exist.
            ConfigError: Unknown policy or backend.
        """
        if policy not in POLICIES:
            raise ConfigError(
                f"data.image_policy: '{policy}' is unknown; use {', '.join(POLICIES)}"
            )
        self._folder = check_folder(folder)
        self._size = size
        self._policy, self._grids = policy, tuple(grids)
        self._fill = tuple(int(channel * 255) for channel in mean)
        self._max_pixels = max_pixels
        self._decoder = make_decoder(backend, threads, device, device_id)
        self._readers = ThreadPoolExecutor(max(threads, 1), thread_name_prefix="read")

    @property
    def backend(self) -> str:
        """Name of the decoder in use."""
        return self._decoder.name

    def load(self, items: Sequence[tuple[str, str]], planned: Sequence[Grid] = ()) -> Tensor:
        """Loads images.

        Args:
            items: (annotation id, path relative to the folder) of each image.
            planned: (columns, rows) that were planned for each image, (0, 0) for one tile; empty:
                not checked.

        Returns:
            uint8 [tiles of all images, 3, size, size] RGB, contiguous; on the GPU if any was
            decoded there.

        Raises:
            DataError: The first bad image, by annotation id and path; or one whose tiles are
                not those planned.
        """
        if not items:
            return torch.empty(0, 3, self._size, self._size, dtype=torch.uint8)
        files = list(self._readers.map(self._read, items))
        decoded = self._decoder.decode(files)
        if planned:
            for file, image, grid in zip(files, decoded, planned, strict=True):
                self._check_grid(file, image, grid)
        tiles = [
            to_tiles(image, self._size, self._policy, self._fill, self._grids) for image in decoded
        ]
        elsewhere = [tile.device for tile in tiles if tile.device.type != "cpu"]
        if elsewhere:  # what Pillow decoded joins what DALI decoded on the GPU
            tiles = [tile.to(elsewhere[0]) for tile in tiles]
        return torch.cat(tiles)

    def _check_grid(self, file: ImageFile, image: Tensor, planned: Grid) -> None:
        height, width = image.shape[-2:]
        plan = plan_tiles(
            width, height, policy=self._policy, tile_size=self._size, grids=self._grids
        )
        if plan.grid != planned:
            raise DataError(
                f"{file.who} is {width} x {height} pixels, a canvas of {list(plan.grid)} tiles, "
                f"but {list(planned)} were planned; it changed since its size was read, restart"
            )

    def close(self) -> None:
        """Ends threads and gives the decoder's memory back."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()

    def _read(self, item: tuple[str, str]) -> ImageFile:
        sample_id, path = item
        return read_image_file(self._folder, path, sample_id, self._max_pixels)


def to_tiles(
    image: Tensor, size: int, policy: str, fill: Sequence[int], grids: Sequence[Grid] = ()
) -> Tensor:
    """Makes an image the tiles of its plan (`plan_tiles`).

    Args:
        image: uint8 [3, height, width].
        size: Side of a tile in pixels.
        policy: `anyres_stretch`, `anyres_letterbox`, or one of `to_tile`.
        fill: RGB of the borders of `pad`, 0..255.
        grids: (columns, rows) of the canvases that AnyRes may choose.

    Returns:
        uint8 [tiles, 3, size, size], contiguous: base view, then the canvas row by row.
    """
    if policy not in ANYRES_POLICIES:
        return to_tile(image, size, policy, fill)[None]
    height, width = image.shape[-2:]
    plan = plan_tiles(width, height, policy=policy, tile_size=size, grids=grids)
    (x, y), (wide, high) = plan.offset, plan.resized
    canvas = image.new_zeros(3, plan.rows * size, plan.columns * size)
    canvas[:, y : y + high, x : x + wide] = _resize(image, high, wide)
    cut = canvas.view(3, plan.rows, size, plan.columns, size).permute(1, 3, 0, 2, 4)
    return torch.cat([_resize(image, size, size)[None], cut.flatten(0, 1)]).contiguous()


def to_tile(image: Tensor, size: int, policy: str, fill: Sequence[int]) -> Tensor:
    """Makes an image a square of `size` pixels.

    stretch: resized to the square, aspect ratio lost (SigLIP's processor).
    pad: centred on a square of colour `fill`, then resized (LLaVA-1.5).
    crop: shortest edge resized to `size`, centre cut out (CLIP's processor, its own rounding).

    Args:
        image: uint8 [3, height, width].
        size: Side of the tile in pixels.
        policy: As above.
        fill: RGB of the borders, 0..255.

    Returns:
        uint8 [3, size, size], contiguous.
    """
    height, width = image.shape[-2:]
    if policy == "crop":
        plan = plan_tiles(width, height, policy=policy, tile_size=size, grids=())
        (wide, high), left, top = plan.resized, -plan.offset[0], -plan.offset[1]
        return _resize(image, high, wide)[:, top : top + size, left : left + size].contiguous()
    if policy == "pad" and height != width:
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        canvas = torch.tensor(fill, dtype=torch.uint8, device=image.device)
        canvas = canvas[:, None, None].repeat(1, side, side)
        canvas[:, top : top + height, left : left + width] = image
        image = canvas
    return _resize(image, size, size).contiguous()


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bicubic resize of uint8 [3, h, w]; the same size is a copy of nothing."""
    if image.shape[-2:] == (height, width):
        return image
    batch = image[None]
    if image.device.type == "cpu":
        # Channels-last uint8 takes torch's integer path, which is Pillow's algorithm.
        batch = batch.contiguous(memory_format=torch.channels_last)
        return functional.interpolate(
            batch, size=(height, width), mode="bicubic", antialias=True, align_corners=False
        )[0]
    resized = functional.interpolate(
        batch.float(), size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return resized.round_().clamp_(0, 255).to(torch.uint8)[0]
