"""Image files to square uint8 tiles (one, or a base view and a canvas), whatever the decoder.

Decoding is DALI's or Pillow's, resizing torch's for both (`dattn_mcore.data.resize`). So a tile
does not depend on the backend wherever the decoders agree, and they agree bit for bit on what
`suits_dali` lets DALI decode.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dattn_mcore.config.schema import Config
from dattn_mcore.data.decode_dali import DaliDecoder
from dattn_mcore.data.decode_pillow import PillowDecoder
from dattn_mcore.data.image_files import ImageFile, check_image
from dattn_mcore.data.image_rules import DEFAULT_RULES, rules_of
from dattn_mcore.data.resize import fits_no_gpu, to_tiles
from dattn_mcore.data.tiles import POLICIES, Grid, tiling_of_image
from dattn_mcore.errors import ConfigError, DataError, RankError
from dattn_mcore.hf.image_rules_dattn import ImageRules
from dattn_mcore.parallel.packages import import_problem

_LOG = logging.getLogger(__name__)
BACKENDS = ("auto", "dali", "pillow")
_GROUP = 32  # images that are read ahead, and decoded at once, where their bytes allow it
# What reading, decoding and resizing may hold in memory for each thread; one that takes more is
# decoded alone. Pillow takes 12 bytes a pixel at most: 4 for an image, and as much for each of what
# its colours and its orientation make of it.
BYTES_PER_THREAD = 256 * 2**20
BYTES_PER_PIXEL = 12
_SHOWN = 200  # characters of what a library says
_said: set[str] = set()  # what is logged once a process


def _say_resized_on_cpu(who: str, reason: str) -> None:
    if "resize" not in _said:
        _said.add("resize")
        _LOG.warning(
            "%s does not fit the GPU's resize (%s); it is resized on the CPU, and so are others "
            "like it",
            who,
            reason[:_SHOWN],
        )


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
    decoder: Decoder
    problem = import_problem("nvidia.dali")  # an extra, and slow to import
    if problem is None:
        decoder, why = DaliDecoder(threads, device, device_id), "DALI is installed"
    elif backend == "dali":
        raise ConfigError(
            f"data.image_backend: 'dali' {problem}; install the extra 'dali', or set "
            "data.image_backend=pillow"
        )
    else:
        decoder, why = PillowDecoder(threads), f"DALI {problem}"
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
        wanted: Which of its tiles are kept, one or more; None: all.
    """

    who: str
    read: Callable[[], bytes]
    num_tiles: int = 1
    grid: Grid = (0, 0)
    wanted: range | None = None

    @property
    def kept(self) -> slice:
        """The same, of its tiles."""
        wanted = range(self.num_tiles) if self.wanted is None else self.wanted
        return slice(wanted.start, wanted.stop)


@dataclass(frozen=True)
class ImageFailure:
    """An image that could not be loaded.

    Attributes:
        index: Its place among the requests.
        stage: `read` (file, header, size), `decode` or `resize`.
        reason: One line.
    """

    index: int
    stage: str
    reason: str


@dataclass(frozen=True)
class _Flying:
    """A decoded image of `size` bytes, until it is resized."""

    resized: Future[Tensor | DataError]
    size: int


def _cost(batch: Sequence[tuple[int, ImageFile]]) -> int:
    """Most bytes that a batch takes until it is decoded, the files included."""
    return sum(len(f.data) + BYTES_PER_PIXEL * f.width * f.height for _, f in batch)


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
        rules: ImageRules = DEFAULT_RULES,
    ) -> None:
        """Chooses the decoder.

        Args:
            size: Side of a tile in pixels.
            policy: How an image becomes tiles (see `dattn_mcore.data.resize`).
            grids: (columns, rows) of the canvases that AnyRes policies may choose.
            mean: Per-channel mean in 0..1; its colour fills the borders of `pad`, and the tiles
                of an image that cannot be loaded.
            backend: `auto`, `dali` or `pillow`.
            threads: Threads that read, decode and resize.
            max_pixels: Larger images are refused.
            device: Where DALI decodes: `cpu` or `gpu`.
            device_id: Index of the GPU.
            rules: Orientation, transparency and ties of canvases.

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
        self._max_pixels, self._rules = max_pixels, rules
        self._decoder = make_decoder(backend, threads, device, device_id)
        self._threads = ThreadPoolExecutor(max(threads, 1), thread_name_prefix="images")
        self.most_bytes = BYTES_PER_THREAD * max(threads, 1)
        self._lock, self._bytes_ahead = threading.Lock(), 0

    @classmethod
    def of(cls, config: Config, device: str = "cpu", device_id: int | None = None) -> ImageLoader:
        """Returns the loader of a run's images; for the arguments see `__init__`."""
        data = config.data
        return cls(
            size=config.model.vision.image_size,
            policy=data.image_policy,
            grids=data.anyres_grids,
            mean=data.image_mean,
            backend=data.image_backend,
            threads=data.decode_threads,
            max_pixels=data.max_image_pixels,
            device=device,
            device_id=device_id,
            rules=rules_of(data),
        )

    @property
    def backend(self) -> str:
        """Name of the decoder in use."""
        return self._decoder.name

    def load(self, requests: Sequence[ImageRequest]) -> tuple[Tensor, list[ImageFailure]]:
        """Loads images: reading, decoding and resizing overlap.

        Returns:
            uint8 [planned tiles of all images that are wanted, 3, size, size] RGB, contiguous; on
            the GPU if any was decoded there. And what failed: those tiles have the mean's colour.

        Raises:
            RankError: the GPU fails.
        """
        if not requests:
            return torch.empty(0, 3, self._size, self._size, dtype=torch.uint8), []
        failures: list[ImageFailure] = []
        resized: list[Future[Tensor | DataError] | None] = [None] * len(requests)
        flying: deque[_Flying] = deque()
        batch: list[tuple[int, ImageFile]] = []
        for index, file in self._files(requests):
            if isinstance(file, DataError):
                failures.append(ImageFailure(index, "read", str(file)))
                continue
            if batch and (len(batch) == _GROUP or _cost([*batch, (index, file)]) > self.most_bytes):
                failures += self._decode(batch, resized, flying)
                batch = []
            batch.append((index, file))
        failures += self._decode(batch, resized, flying)
        tiles = []
        for index, (future, request) in enumerate(zip(resized, requests, strict=True)):
            made = future.result() if future is not None else None
            if isinstance(made, DataError):
                failures.append(ImageFailure(index, "resize", str(made)))
            whole = made if isinstance(made, Tensor) else self._grey(request.num_tiles)
            tiles.append(whole[request.kept])
        elsewhere = [tile.device for tile in tiles if tile.device.type != "cpu"]
        if elsewhere:  # what Pillow decoded joins what DALI decoded on the GPU
            tiles = [tile.to(elsewhere[0]) for tile in tiles]
        return torch.cat(tiles), sorted(failures, key=lambda failure: failure.index)

    def close(self) -> None:
        """Ends threads and gives the decoder's memory back."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()

    def _files(
        self, requests: Sequence[ImageRequest]
    ) -> Iterator[tuple[int, ImageFile | DataError]]:
        """Reads and checks images in order, some ahead of what is asked for."""
        ahead: deque[Future[ImageFile | DataError | None]] = deque()
        for index, request in enumerate(requests):
            while len(ahead) < min(_GROUP, len(requests) - index):
                ahead.append(self._threads.submit(self._read_ahead, requests[index + len(ahead)]))
            file = ahead.popleft().result()
            if isinstance(file, ImageFile):
                with self._lock:
                    self._bytes_ahead -= len(file.data)
            yield index, self._read(request) if file is None else file

    def _read_ahead(self, request: ImageRequest) -> ImageFile | DataError | None:
        """Reads an image; None where too much has been read ahead: its turn will come."""
        file = self._read(request)
        if isinstance(file, ImageFile):
            with self._lock:
                if self._bytes_ahead and self._bytes_ahead + len(file.data) > self.most_bytes // 2:
                    return None
                self._bytes_ahead += len(file.data)
        return file

    def _decode(
        self,
        batch: Sequence[tuple[int, ImageFile]],
        resized: list[Future[Tensor | DataError] | None],
        flying: deque[_Flying],
    ) -> list[ImageFailure]:
        """Decodes a batch when there is room for it, and has its images resized.

        Args:
            batch: Place among the requests, and file.
            resized: Gets what becomes of each image.
            flying: Images that are decoded and not yet resized, oldest first.

        Returns:
            What could not be decoded.
        """
        while flying and _cost(batch) + sum(image.size for image in flying) > self.most_bytes:
            wait([flying.popleft().resized])
        failures = []
        decoded = self._decoder.decode([file for _, file in batch])
        for (index, file), image in zip(batch, decoded, strict=True):
            if isinstance(image, DataError):
                failures.append(ImageFailure(index, "decode", str(image)))
            else:
                future = self._threads.submit(self._to_tiles, file, image)
                resized[index] = future
                flying.append(_Flying(future, image.nbytes))
        return failures

    def _read(self, request: ImageRequest) -> ImageFile | DataError:
        """Reads and checks one image; its tiling must be the one it was packed with."""
        try:
            file = check_image(request.who, request.read(), self._max_pixels, self._rules)
            tiling = tiling_of_image(
                who=request.who,
                width=file.width,
                height=file.height,
                policy=self._policy,
                tile_size=self._size,
                grids=self._grids,
                max_pixels=self._max_pixels,
                ties=self._rules.anyres_ties,
            )
        except DataError as error:
            return error
        if tiling.grid != request.grid:
            return DataError(
                f"{request.who} is {file.width} x {file.height} pixels, a canvas of "
                f"{list(tiling.grid)} tiles, but {list(request.grid)} were planned; it changed "
                "since the index was made"
            )
        return file

    def _to_tiles(self, file: ImageFile, image: Tensor) -> Tensor | DataError:
        """Resizes one image, on the CPU what the GPU has no room for.

        A failure is that image's, not the run's; of a GPU it is this rank's.

        Raises:
            RankError: the GPU fails.
        """
        height, width = image.shape[-2:]
        if (width, height) != (file.width, file.height):  # an icon's picture has its own header
            return DataError(
                f"{file.who} is {width} x {height} pixels, but its header says {file.width} x "
                f"{file.height}"
            )
        try:
            return to_tiles(
                image,
                self._size,
                self._policy,
                self._fill,
                self._grids,
                self._rules.anyres_ties,
            )
        except Exception as error:  # noqa: BLE001  (torch has no class for "no memory")
            reason = " ".join(str(error).split()) or type(error).__name__
            if image.device.type == "cpu":
                return DataError(f"{file.who} cannot be resized ({reason})")
            if not fits_no_gpu(error):
                raise RankError(
                    f"the GPU fails while it resizes an image, {file.who} ({reason[:_SHOWN]}); "
                    "take this machine out of the run, or set data.image_backend=pillow"
                ) from None
            _say_resized_on_cpu(file.who, reason)
            return self._to_tiles(file, image.cpu())

    def _grey(self, num_tiles: int) -> Tensor:
        fill = torch.tensor(self._fill, dtype=torch.uint8)[:, None, None]
        return fill.expand(num_tiles, 3, self._size, self._size).contiguous()
