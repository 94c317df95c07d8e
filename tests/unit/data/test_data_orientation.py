"""Orientation: the eight ways a picture may lie in a file, through every part of the data path."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dattn_mcore.config.schema import Config
from dattn_mcore.data.image_files import check_image, probe_image
from dattn_mcore.data.index.store import open_index
from dattn_mcore.data.pages.preview import write_preview
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from dattn_mcore.errors import DataError
from dattn_mcore.hf.image_rules_dattn import ImageRules, to_rgb
from tests.unit.data.folder_loader import FolderLoader
from tests.unit.data.golden import BACKENDS, picture

MakeConfig = Callable[..., Config]
LIMIT = 10**8
IGNORED = ImageRules(apply_orientation=False)
# What a camera held in each way writes: the picture as it stands, laid down for the file.
LAY_DOWN = {
    1: lambda image: image,
    2: ImageOps.mirror,
    3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
    4: ImageOps.flip,
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
}
LOSSLESS = {"png": {}, "webp": {"lossless": True}, "tif": {}}


def tagged(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def write(path: Path, image: Image.Image, orientation: int, **options: object) -> bytes:
    LAY_DOWN[orientation](image).save(path, exif=tagged(orientation), **options)
    return path.read_bytes()


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("orientation", LAY_DOWN)
def test_a_file_shows_what_people_see(tmp_path: Path, orientation: int, backend: str) -> None:
    """Its pixels are those of the upright picture; ignored, those of the file."""
    seen = picture(48, 31)
    for kind, options in LOSSLESS.items():
        write(tmp_path / f"x.{kind}", seen, orientation, **options)
        loader = FolderLoader(tmp_path, size=56, policy="stretch", backend=backend)
        plain = FolderLoader(tmp_path, size=56, policy="stretch", backend=backend, rules=IGNORED)
        seen.save(tmp_path / "seen.png")
        LAY_DOWN[orientation](seen).save(tmp_path / "lying.png")
        assert torch.equal(loader.load([("a", f"x.{kind}")]), loader.load([("a", "seen.png")]))
        if kind != "tif":  # Pillow turns it, whatever is asked
            expected = plain.load([("a", "lying.png")])
            assert torch.equal(plain.load([("a", f"x.{kind}")]), expected)
        loader.close()
        plain.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoders_turn_as_pillow_does(tmp_path: Path, backend: str) -> None:
    """JPEG, whose pixels no other orientation has bit for bit: `exif_transpose` is the oracle."""
    from dattn_mcore.data.images import make_decoder

    decoder = make_decoder(backend, 1)
    data = [write(tmp_path / f"{n}.jpg", picture(57, 40), n, quality=90) for n in LAY_DOWN]
    files = [check_image("x", each, LIMIT) for each in data]
    for orientation, file, found in zip(LAY_DOWN, files, decoder.decode(files), strict=True):
        with Image.open(tmp_path / f"{orientation}.jpg") as opened:
            expected = pixels(ImageOps.exif_transpose(opened).convert("RGB"))
        assert isinstance(found, torch.Tensor)
        assert (file.width, file.height, file.orientation) == (57, 40, orientation)
        assert torch.equal(found, expected), orientation
    decoder.close()


@pytest.mark.parametrize("orientation", LAY_DOWN)
def test_headers_swap_width_and_height(tmp_path: Path, orientation: int) -> None:
    for kind, options in {**LOSSLESS, "jpg": {}}.items():
        data = write(tmp_path / f"x.{kind}", picture(48, 31), orientation, **options)
        header = probe_image("x", data, LIMIT)
        assert (header.width, header.height) == (48, 31), kind
        lying = probe_image("x", data, LIMIT, IGNORED)
        if kind != "tif":
            assert (lying.width, lying.height) == LAY_DOWN[orientation](picture(48, 31)).size


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
LATE = {
    "exif": chunk(b"eXIf", tagged(6).tobytes()[6:]),
    "xmp": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    "profile": chunk(
        b"zTXt",
        b"Raw profile type exif\0\0"
        + zlib.compress(
            b"\nexif\n%8d\n" % len(tagged(6).tobytes()) + tagged(6).tobytes().hex().encode()
        ),
    ),
    "other": chunk(b"tEXt", b"date:create\0today"),
}


@pytest.mark.parametrize("kind", LATE)
def test_a_png_may_say_it_behind_its_pixels(kind: str) -> None:
    """As `exif_transpose` finds it, and no pixels are read where there is nothing to find."""
    buffer = io.BytesIO()
    picture(48, 31).save(buffer, "PNG")
    data = buffer.getvalue()
    data = data[:-12] + LATE[kind] + data[-12:]
    with Image.open(io.BytesIO(data)) as opened:
        expected = ImageOps.exif_transpose(opened).size
    assert expected == ((48, 31) if kind == "other" else (31, 48))
    header = probe_image("x", data, LIMIT)
    assert (header.width, header.height) == expected
    half = data[: data.index(b"IDAT") + 40]  # the header of a cut file is read all the same
    assert probe_image("x", half, LIMIT).width == 48


def test_damaged_metadata_turns_nothing(tmp_path: Path) -> None:
    for exif in (b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\xff\xff", tagged(9).tobytes()):
        picture(48, 31).save(tmp_path / "x.jpg", exif=exif)
        header = probe_image("x", (tmp_path / "x.jpg").read_bytes(), LIMIT)
        assert (header.width, header.height) == (48, 31)


def test_a_png_of_chunks_without_end_is_refused() -> None:
    buffer = io.BytesIO()
    picture(8, 8).save(buffer, "PNG")
    data = buffer.getvalue()
    data = data[:33] + chunk(b"teSt", b"") * 100_001 + data[33:]
    with pytest.raises(DataError, match="x has over 100000 chunks"):
        probe_image("x", data, LIMIT)


def test_an_image_turned_by_hand_is_not_turned_again(tmp_path: Path) -> None:
    write(tmp_path / "x.png", picture(48, 31), 6)
    with Image.open(tmp_path / "x.png") as opened:
        once = to_rgb(opened, ImageRules())
        transposed = ImageOps.exif_transpose(opened)
    for image in (once, transposed):
        assert torch.equal(pixels(to_rgb(image, ImageRules())), pixels(picture(48, 31)))


@pytest.mark.parametrize("apply", [True, False])
def test_index_and_preview(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path, apply: bool
) -> None:
    (tmp_path / "images").mkdir()
    records = []
    for orientation in LAY_DOWN:
        write(tmp_path / "images" / f"{orientation}.png", picture(240, 100), orientation)
        turns = [{"from": "human", "value": "<image>\nwhich?"}, {"from": "gpt", "value": "7"}]
        records.append(
            {"id": f"r{orientation}", "image": f"{orientation}.png", "conversations": turns}
        )
    (tmp_path / "toy.json").write_text(json.dumps(records))
    config = make_config(
        annotations=str(tmp_path / "toy.json"),
        image_folder=str(tmp_path / "images"),
        image_policy="anyres_stretch",
        visual_budget=64,
        apply_orientation=apply,
    )
    index = open_index(config, toy_tokenizer)
    for number, orientation in enumerate(LAY_DOWN):
        image = index.sample(number).images[0]
        lying = orientation >= 5 and not apply
        assert (image.width, image.height) == ((100, 240) if lying else (240, 100))
        assert image.grid == ((1, 3) if lying else (3, 1))
    page = tmp_path / "page.html"
    write_preview(config, toy_tokenizer, page, 0, 8, [f"r{n}" for n in LAY_DOWN])
    shown = [
        Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")
        for text in re.findall(r"data:image/jpeg;base64,([^\"']+)", page.read_text())
    ]
    assert len(shown) == 8
    for orientation, image in zip(LAY_DOWN, shown, strict=True):
        # The page holds JPEGs: the nearest of all eight is what it must be.
        ways = {n: lay(picture(240, 100)) for n, lay in LAY_DOWN.items()}
        off = {n: mean_off(image, way) for n, way in ways.items() if way.size == image.size}
        assert min(off, key=off.__getitem__) == (1 if apply else orientation)


def mean_off(image: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(image).astype(int) - np.asarray(other).astype(int)).mean())


def test_another_rule_has_an_index_of_its_own(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer
) -> None:
    config = make_config(image_policy="anyres_stretch", visual_budget=256)
    names = {open_index(config, toy_tokenizer).folder}
    for change in (
        {"apply_orientation": False},
        {"transparency": "drop"},
        {"anyres_ties": "first"},
    ):
        data = dataclasses.replace(config.data, **change)
        names.add(open_index(dataclasses.replace(config, data=data), toy_tokenizer).folder)
    assert len(names) == 4
    version = json.loads((names.pop() / "index.json").read_text())["settings"]["version"]
    assert version == 8
