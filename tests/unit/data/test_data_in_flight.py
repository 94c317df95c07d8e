"""What decoding holds in memory: bounded by bytes, whatever the number and size of images."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from dattn_mcore.data import images
from dattn_mcore.data.image_files import ImageFile
from dattn_mcore.data.images import BYTES_PER_PIXEL, ImageFailure, ImageRequest
from dattn_mcore.errors import DataError
from tests.unit.data.folder_loader import FolderLoader
from tests.unit.data.golden import BACKENDS, picture


class Watched:
    """A decoder that counts the bytes of images that are decoded and not yet resized."""

    name = "watched"

    def __init__(self, inner: images.Decoder) -> None:
        self.inner, self.batches = inner, []
        self.held = self.most = 0
        self.lock = threading.Lock()

    def add(self, size: int) -> None:
        with self.lock:
            self.held += size
            self.most = max(self.most, self.held)

    def decode(self, files: list[ImageFile]) -> list[Tensor | DataError]:
        cost = sum(BYTES_PER_PIXEL * file.width * file.height for file in files)
        self.batches.append(len(files))
        self.add(cost)
        decoded = self.inner.decode(files)
        self.add(sum(image.nbytes for image in decoded if isinstance(image, Tensor)) - cost)
        return decoded

    def close(self) -> None:
        self.inner.close()


def watched(loader: FolderLoader, monkeypatch: pytest.MonkeyPatch, bound: int) -> Watched:
    """Puts a bound and a watched decoder into a loader."""
    decoder = Watched(loader.inner._decoder)
    resize = images.to_tiles

    def resized(image: Tensor, *args: object) -> Tensor:
        tiles = resize(image, *args)
        decoder.add(-image.nbytes)
        return tiles

    monkeypatch.setattr(images, "to_tiles", resized)
    loader.inner._decoder, loader.inner.most_bytes = decoder, bound
    return decoder


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_in_flight_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    sizes = [(400, 300), (90, 80), (300, 500), (640, 480), (30, 20), (1000, 700), (64, 64)] * 6
    for number, size in enumerate(sizes):
        picture(*size).save(tmp_path / f"{number}.png")
    items = [(str(number), f"{number}.png") for number in range(len(sizes))]
    loader = FolderLoader(tmp_path, size=28, backend=backend)
    expected = loader.load(items)
    bound = BYTES_PER_PIXEL * 900_000 + 2**20  # more than any one image
    decoder = watched(loader, monkeypatch, bound)
    assert torch.equal(loader.load(items), expected)  # order and pixels do not depend on it
    assert decoder.most <= bound and decoder.held == 0
    assert sum(decoder.batches) == len(sizes) and 1 < max(decoder.batches) < 32
    decoder.batches.clear()
    loader.inner.most_bytes = 1000  # less than any image: they come one by one
    assert torch.equal(loader.load(items), expected)
    assert decoder.batches == [1] * len(sizes)
    loader.close()


def test_small_images_are_decoded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(60, 40).save(tmp_path / "a.png")
    loader = FolderLoader(tmp_path, size=28, backend="pillow")
    decoder = watched(loader, monkeypatch, loader.inner.most_bytes)
    loader.load([(str(number), "a.png") for number in range(70)])
    assert decoder.batches == [32, 32, 6]
    loader.close()


def test_files_read_ahead_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files wait for their turn; a failure stays at its place."""
    picture(60, 40).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    data = data[:-12] + b"\0\0\x27\x10teSt" + bytes(10_000 + 4) + data[-12:]
    loader = FolderLoader(tmp_path, size=28, backend="pillow")
    loader.inner.most_bytes = 40_000
    most = 0
    read = loader.inner._read_ahead

    def watched_read(request: ImageRequest) -> object:
        nonlocal most
        file = read(request)
        most = max(most, loader.inner._bytes_ahead)
        return file

    monkeypatch.setattr(loader.inner, "_read_ahead", watched_read)

    def missing() -> bytes:
        raise DataError("five is gone")

    requests = [ImageRequest(str(n), missing if n == 5 else lambda: data) for n in range(40)]
    tiles, failures = loader.inner.load(requests)
    assert failures == [ImageFailure(5, "read", "five is gone")]
    good = [number for number in range(40) if number != 5]
    assert all(torch.equal(tiles[number], tiles[0]) for number in good)
    assert 10_000 < most <= 20_000 and loader.inner._bytes_ahead == 0
    loader.close()


# Prints the memory that loading takes beyond the imports and the loader.
_LOAD = """
import resource, sys
from pathlib import Path
import torch
from tests.unit.data.folder_loader import FolderLoader
torch.set_num_threads(1)
loader = FolderLoader(Path(sys.argv[1]), size=56, backend="pillow", threads=2)
loader.load([("x", "small.png")])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loader.load([(str(number), "large.png") for number in range(24)])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_large_images_of_small_files_fit_into_memory(tmp_path: Path) -> None:
    """24 images of 12 megapixels, 36 MB each once decoded: two groups of them would be 860 MB."""
    Image.new("RGB", (4000, 3000), (9, 8, 7)).save(tmp_path / "large.png", compress_level=1)
    picture(8, 8).save(tmp_path / "small.png")
    command = [sys.executable, "-c", _LOAD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2 * images.BYTES_PER_THREAD
