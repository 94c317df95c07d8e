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
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from dattn_mcore.data.decode_dali import DaliDecoder
from dattn_mcore.data.decode_pillow import PillowDecoder
from dattn_mcore.data.image_files import ImageFile, check_image
from dattn_mcore.data.tiles import ANYRES_POLICIES, POLICIES, Grid, plan_tiles
from dattn_mcore.errors import ConfigError, DataError

_LOG = logging.getLogger(__name__)
BACKENDS = ("auto", "dali", "pillow")
_GROUP = 32  # images that are decoded at once, while the ones before are resized
_said: set[str] = set()  # what `auto` chose is logged once a process


class Decoder(Protocol):
    """Decodes checked image files."""

    name: str

    def decode(self, images: Sequence[ImageFile]) -> list[Tensor | DataError]:
        """Returns for each image uint8 [3, height, width] RGB, or why it cannot be decoded."""

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


@dataclass(frozen=True)
class ImageRequest:
    """An image to load.

    Attributes:
        who: How messages name it.
        read: Reads its file; the result is checked.
        num_tiles: Tiles that were planned for it.
        grid: (columns, rows) of its planned canvas; (0, 0) for one square.
    """

    who: str
    read: Callable[[], bytes]
    num_tiles: int = 1
    grid: Grid = (0, 0)


@dataclass(frozen=True)
class ImageFailure:
    """An image that could not be loaded.

    Attributes:
        index: Its place among the requests.
        stage: `read` (file, header, size) or `decode`.
        reason: One line.
    """

    index: int
    stage: str
    reason: str


class ImageLoader:
    """Loads images as tiles; one that is bad becomes grey tiles and a failure."""

    def __init__(
        self,
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
        """Chooses the decoder.

        Args:
            size: Side of a tile in pixels.
            policy: How an image becomes tiles (see `to_tiles`).
            grids: (columns, rows) of the canvases that AnyRes policies may choose.
            mean: Per-channel mean in 0..1; its colour fills the borders of `pad`, and the tiles
                of an image that cannot be loaded.
            backend: `auto`, `dali` or `pillow`.
            threads: Threads that read, decode and resize.
            max_pixels: Larger images are refused.
            device: Where DALI decodes: `cpu` or `gpu`.
            device_id: Index of the GPU.

        Raises:
            ConfigError: Unknown policy or backend.
        """
        if policy not in POLICIES:
            raise ConfigError(
                f"data.image_policy: '{policy}' is unknown; use {', '.join(POLICIES)}"
            )
        self._size = size
        self._policy, self._grids = policy, tuple(grids)
        self._fill = tuple(int(channel * 255) for channel in mean)
        self._max_pixels = max_pixels
        self._decoder = make_decoder(backend, threads, device, device_id)
        self._threads = ThreadPoolExecutor(max(threads, 1), thread_name_prefix="images")

    @property
    def backend(self) -> str:
        """Name of the decoder in use."""
        return self._decoder.name

    def load(self, requests: Sequence[ImageRequest]) -> tuple[Tensor, list[ImageFailure]]:
        """Loads images: reading, decoding and resizing overlap.

        Returns:
            uint8 [planned tiles of all images, 3, size, size] RGB, contiguous; on the GPU if any
            was decoded there. And what failed: those tiles have the mean's colour.
        """
        if not requests:
            return torch.empty(0, 3, self._size, self._size, dtype=torch.uint8), []
        failures: list[ImageFailure] = []
        resized: list[Future[Tensor] | None] = [None] * len(requests)
        reading = self._read_group(requests, 0)
        for start in range(0, len(requests), _GROUP):
            files = [future.result() for future in reading]
            reading = self._read_group(requests, start + _GROUP)
            good = []
            for offset, file in enumerate(files):
                if isinstance(file, DataError):
                    failures.append(ImageFailure(start + offset, "read", str(file)))
                else:
                    good.append((start + offset, file))
            # At most two groups of whole images are in memory: this one and the one before.
            wait([future for future in resized[max(start - _GROUP, 0) : start] if future])
            decoded = self._decoder.decode([file for _, file in good])
            for (index, _), image in zip(good, decoded, strict=True):
                if isinstance(image, DataError):
                    failures.append(ImageFailure(index, "decode", str(image)))
                else:
                    resized[index] = self._threads.submit(self._to_tiles, image)
            del decoded
        tiles = [
            future.result() if future is not None else self._grey(request.num_tiles)
            for future, request in zip(resized, requests, strict=True)
        ]
        elsewhere = [tile.device for tile in tiles if tile.device.type != "cpu"]
        if elsewhere:  # what Pillow decoded joins what DALI decoded on the GPU
            tiles = [tile.to(elsewhere[0]) for tile in tiles]
        return torch.cat(tiles), sorted(failures, key=lambda failure: failure.index)

    def close(self) -> None:
        """Ends threads and gives the decoder's memory back."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()

    def _read_group(
        self, requests: Sequence[ImageRequest], start: int
    ) -> list[Future[ImageFile | DataError]]:
        group = requests[start : start + _GROUP]
        return [self._threads.submit(self._read, request) for request in group]

    def _read(self, request: ImageRequest) -> ImageFile | DataError:
        """Reads and checks one image; its plan must be the one that its sample was packed with."""
        try:
            file = check_image(request.who, request.read(), self._max_pixels)
        except DataError as error:
            return error
        plan = plan_tiles(
            *(file.width, file.height),
            policy=self._policy,
            tile_size=self._size,
            grids=self._grids,
        )
        if plan.grid != request.grid:
            return DataError(
                f"{request.who} is {file.width} x {file.height} pixels, a canvas of "
                f"{list(plan.grid)} tiles, but {list(request.grid)} were planned; it changed since "
                "the index was made"
            )
        return file

    def _to_tiles(self, image: Tensor) -> Tensor:
        return to_tiles(image, self._size, self._policy, self._fill, self._grids)

    def _grey(self, num_tiles: int) -> Tensor:
        fill = torch.tensor(self._fill, dtype=torch.uint8)[:, None, None]
        return fill.expand(num_tiles, 3, self._size, self._size).contiguous()


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
