"""Images: both decoders against each other, and every bad file."""

from __future__ import annotations

import io
import logging
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dattn_mcore.data import decode_dali, images
from dattn_mcore.data.decode_dali import DaliDecoder, suits_dali
from dattn_mcore.data.decode_pillow import decode_with_pillow
from dattn_mcore.data.image_files import ImageFile, probe_image_file, read_image_file
from dattn_mcore.data.images import make_decoder
from dattn_mcore.data.resize import to_tile
from dattn_mcore.errors import ConfigError, DataError
from tests.unit.data.folder_loader import FolderLoader as ImageLoader
from tests.unit.data.golden import BACKENDS, needs_dali, picture

LIMIT = 100_000_000


@pytest.mark.parametrize("shape", [(640, 427), (333, 500), (57, 900)])
def test_close_to_the_installed_pillow_whatever_its_order_of_passes(
    shape: tuple[int, int],
) -> None:
    # Measured with Pillow 13.0: up to 18 grey levels at the edge of noise, mean 0.2 levels.
    image = picture(*shape)
    tile = to_tile(torch.from_numpy(np.array(image)).permute(2, 0, 1), 384, "stretch", (0, 0, 0))
    there = np.array(image.resize((384, 384), Image.Resampling.BICUBIC))
    difference = (tile.int() - torch.from_numpy(there).permute(2, 0, 1).int()).abs().float()
    assert difference.max() <= 24
    assert difference.mean() <= 0.3


@needs_dali
def test_dali_equals_pillow_bit_for_bit_where_the_rule_sends_it(golden: Path) -> None:
    decoder = DaliDecoder(threads=1)
    for file in sorted(golden.iterdir()):
        checked = read_image_file(golden, file.name, "x", LIMIT)
        assert suits_dali(checked) == file.name.startswith("d_"), file.name
        if suits_dali(checked):
            (there,) = decoder._run([checked])
            assert torch.equal(there, decode_with_pillow(checked)), file.name
    decoder.close()


@needs_dali
def test_tiles_do_not_depend_on_backend_or_neighbours(golden: Path) -> None:
    names = sorted(file.name for file in golden.iterdir())
    items = [(name, name) for name in names]
    dali = ImageLoader(golden, size=70, backend="dali")
    pillow = ImageLoader(golden, size=70, backend="pillow")
    together = dali.load(items)
    assert torch.equal(together, pillow.load(items))
    assert torch.equal(together, torch.cat([dali.load([item]) for item in items]))
    dali.close()
    pillow.close()


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    loader = ImageLoader(tmp_path, size=8, backend="pillow")
    assert loader.load([("a", "clear.png")]).unique().tolist() == [255]
    loader.close()


def test_a_tile_of_the_right_size_is_copied_exactly() -> None:
    image = torch.arange(3 * 56 * 56).reshape(3, 56, 56).to(torch.uint8)
    for policy in ("stretch", "pad", "crop"):
        assert torch.equal(to_tile(image, 56, policy, (0, 0, 0)), image)


def test_no_images_is_an_empty_tensor(tmp_path: Path) -> None:
    loader = ImageLoader(tmp_path, size=56, backend="pillow")
    assert loader.load([]).shape == (0, 3, 56, 56)
    loader.close()


def _jpeg(size: tuple[int, int] = (131, 97), **options: object) -> bytes:
    buffer = io.BytesIO()
    picture(*size).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _png(size: tuple[int, int] = (131, 97)) -> bytes:
    buffer = io.BytesIO()
    picture(*size).save(buffer, "PNG")
    return buffer.getvalue()


def _huge_png() -> bytes:
    """A PNG whose header claims 60000 x 60000 pixels (3.6 gigapixels)."""
    body = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(b"IHDR" + body))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + body + crc + _png()[33:]


def _write(make: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(make()) and None


def _outside(path: Path) -> None:
    (path.parent.parent / "outside.jpg").write_bytes(_jpeg())
    path.symlink_to(path.parent.parent / "outside.jpg")


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "does not exist below"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "does not exist below"),
    "link in a circle": (lambda path: path.symlink_to(path.name), "cannot be resolved"),
    "outside through a link": (_outside, "outside '"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "pipe": (lambda path: os.mkfifo(path), "is not a regular file"),
    "empty": (_write(lambda: b""), "is an empty file"),
    "text": (_write(lambda: b"<html>404</html>"), "is not an image (unknown signature"),
    "other binary": (_write(lambda: b"PK\3\4" + b"\0" * 99), "is not an image"),
    "signature only": (_write(lambda: _jpeg()[:3]), "no readable header"),
    "cut header": (_write(lambda: _png()[:20]), "no readable header"),
    "cut jpeg": (_write(lambda: _jpeg()[:2000]), "is truncated"),
    "cut jpeg by 100 bytes": (_write(lambda: _jpeg()[:-100]), "is truncated"),
    "cut progressive": (_write(lambda: _jpeg(progressive=True)[:-700]), "is truncated"),
    "cut png": (_write(lambda: _png()[:-400]), "is truncated"),
    "too many pixels": (_write(_huge_png), "is too large"),
    "more pixels than configured": (
        _write(lambda: _png((1100, 1000))),
        "is too large: 1100 x 1000",
    ),
    "more bytes than pixels allow": (
        _write(lambda: b"\xff\xd8\xff" + b"\0" * (9 * 2**20 + 8_000_000)),
        "bytes cannot be an image",
    ),
    "damaged png": (
        _write(lambda: _png()[:200] + b"\xff" * 400 + _png()[600:]),
        "cannot be decoded",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_one_line_that_names_annotation_and_path(
    tmp_path: Path, name: str, backend: str
) -> None:
    make, message = BAD_FILES[name]
    folder = tmp_path / "images"
    folder.mkdir()
    for good in ("a.jpg", "z.jpg"):
        (folder / good).write_bytes(_jpeg())
    make(folder / "bad.jpg")
    loader = ImageLoader(folder, size=56, backend=backend, max_pixels=1_000_000)
    with pytest.raises(DataError) as raised:
        loader.load([("one", "a.jpg"), ("two", "bad.jpg"), ("three", "z.jpg")])
    said = str(raised.value)
    assert said.startswith("annotation 'two': image 'bad.jpg'"), said
    assert message in said, said
    assert "\n" not in said
    # The loader is good for the next batch.
    assert loader.load([("one", "a.jpg"), ("three", "z.jpg")]).shape == (2, 3, 56, 56)
    loader.close()


def test_links_inside_the_folder_are_fine(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jpg").write_bytes(_jpeg())
    (tmp_path / "link").symlink_to("real")
    loader = ImageLoader(tmp_path, size=56, backend="pillow")
    assert loader.load([("x", "link/a.jpg")]).shape == (1, 3, 56, 56)
    loader.close()


@needs_dali
def test_copies_of_a_dali_batch_are_awaited_before_the_next(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def build(*arguments: object) -> object:
        pipeline = build_pipeline(*arguments)
        run = pipeline.run
        pipeline.run = lambda: (events.append("run"), run())[1]
        return pipeline

    build_pipeline = decode_dali._build_pipeline
    monkeypatch.setattr(decode_dali, "_build_pipeline", build)
    monkeypatch.setattr(decode_dali, "_MAX_BATCH", 2)
    monkeypatch.setattr(decode_dali, "wait_for_stream", lambda d: events.append(f"wait {d}"))
    names = ["d_0.jpg", "d_rgb.png", "d_grey.jpg"]
    decoder = DaliDecoder(threads=1)
    decoder.decode([read_image_file(golden, name, name, LIMIT) for name in names])
    decoder.close()
    assert events == ["run", "wait cpu"] * 2


@needs_dali
def test_an_image_that_only_dali_refuses_goes_to_pillow_alone(
    golden: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Send everything to DALI, which refuses GIF and ICO: the rest must be as ever.
    monkeypatch.setattr(decode_dali, "suits_dali", lambda image: True)
    names = ["d_0.jpg", "p_plain.gif", "d_rgb.png", "p_small.ico", "d_grey.jpg"]
    files = [read_image_file(golden, name, name, LIMIT) for name in names]
    decoder = DaliDecoder(threads=1)
    with caplog.at_level(logging.WARNING):
        decoded = decoder.decode(files)
    for file, tensor in zip(files, decoded, strict=True):
        assert torch.equal(tensor, decode_with_pillow(file))
    refused = [line for line in caplog.messages if "DALI refuses" in line]
    assert len(refused) == 2
    assert "p_plain.gif" in refused[0]
    decoder.close()


@needs_dali
def test_large_batches_are_cut(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_dali, "_MAX_BATCH_PIXELS", 3 * 131 * 97)
    files = [read_image_file(golden, "d_0.jpg", "x", LIMIT)] * 10
    assert [len(b) for b in decode_dali._batches(range(10), files)] == [3, 3, 3, 1]
    decoder = DaliDecoder(threads=1)
    assert len(decoder.decode(files)) == 10
    decoder.close()


def test_auto_falls_back_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fresh_imports: None
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia", None)
    monkeypatch.setattr(images, "_said", set())
    with caplog.at_level(logging.INFO, logger="dattn_mcore"):
        for _ in range(2):
            decoder = make_decoder("auto", 1)
            assert decoder.name == "pillow"
            decoder.close()
    said = [line for line in caplog.messages if "decoded with" in line]
    assert len(said) == 1
    assert said[0].startswith("images are decoded with pillow (DALI is not installed)")
    with pytest.raises(ConfigError, match="data.image_backend: 'dali' is not installed"):
        make_decoder("dali", 1)


def test_tiles_of_two_devices_end_on_the_decoders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(_png())
    loader = ImageLoader(tmp_path, size=56, backend="pillow")
    on_cpu = torch.zeros(3, 97, 131, dtype=torch.uint8)
    # "meta" stands for a GPU: a device that is not the CPU.
    monkeypatch.setattr(loader.inner._decoder, "decode", lambda files: [on_cpu, on_cpu.to("meta")])
    tiles = loader.load([("a", "a.png"), ("b", "a.png")])
    assert (tiles.device.type, tiles.shape, tiles.dtype) == ("meta", (2, 3, 56, 56), torch.uint8)
    loader.close()


def test_what_resizing_throws_is_that_images_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("a.png", (50, 40)), ("b.png", (60, 40)), ("c.png", (70, 40))):
        (tmp_path / name).write_bytes(_png(size))
    loader = ImageLoader(tmp_path, size=56, backend="pillow")
    resize, decode = images.to_tiles, loader.inner._decoder.decode

    def failing(image: torch.Tensor, *args: object) -> torch.Tensor:
        if image.shape[2] == 60:
            raise RuntimeError("not enough memory:\nyou tried to allocate 12 GB")
        return resize(image, *args)

    def turned(files: list[ImageFile]) -> list[torch.Tensor]:
        *others, last = decode(files)
        return [*others, last.transpose(1, 2)]

    monkeypatch.setattr(images, "to_tiles", failing)
    monkeypatch.setattr(loader.inner._decoder, "decode", turned)
    tiles, failures = loader.inner.load(loader.requests([(n, f"{n}.png") for n in "abc"]))
    loader.close()
    assert tiles.shape == (3, 3, 56, 56) and tiles[1:].unique().tolist() == [127]
    assert [(failure.index, failure.stage) for failure in failures] == [
        (1, "resize"),
        (2, "resize"),
    ]
    assert failures[0].reason.endswith(
        "'b.png' cannot be resized (not enough memory: you tried to allocate 12 GB)"
    )
    assert failures[1].reason.endswith("is 40 x 70 pixels, but its header says 70 x 40")


def test_a_missing_image_is_looked_for_without_listing_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.b.png").write_bytes(_png())

    def refuse(*args: object) -> None:
        raise AssertionError("the folder was listed")

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, refuse)
    with pytest.raises(DataError, match=r"; 'a.b.png' is there, with another extension$"):
        probe_image_file(tmp_path, "a.b.jpg", LIMIT)
    with pytest.raises(DataError, match=r"\(data.image_folder\)$"):
        probe_image_file(tmp_path, "a.b.jpg", LIMIT, hint=False)
    with pytest.raises(DataError, match="cannot be resolved|does not exist"):
        probe_image_file(tmp_path, "x" * 300 + ".jpg", LIMIT)


def test_pillow_has_no_lower_limit_than_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "huge.png").write_bytes(_huge_png())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    header = probe_image_file(tmp_path, "huge.png", 60_000 * 60_000)
    assert (header.width, header.height) == (60_000, 60_000)
    with pytest.raises(
        DataError, match="is too large: 60000 x 60000 pixels, data.max_image_pixels"
    ):
        probe_image_file(tmp_path, "huge.png", 60_000 * 60_000 - 1)


def test_wrong_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.image_backend: 'gpu' is unknown"):
        make_decoder("gpu", 1)
    with pytest.raises(ConfigError, match="data.image_policy: 'squash' is unknown"):
        ImageLoader(tmp_path, size=56, policy="squash")
    with pytest.raises(DataError, match=r"data.image_folder: '.*nowhere' does not exist"):
        ImageLoader(tmp_path / "nowhere", size=56)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is not a folder"):
        ImageLoader(tmp_path / "file", size=56)
