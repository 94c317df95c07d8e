"""Images that cannot be read say why: training's checks and evaluation's alike."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image, features

from dattn_mcore.data.image_files import check_image, probe_image
from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.images import Picture
from dattn_mcore.hf import image_rules_dattn
from tests.unit.data.folder_loader import FolderLoader
from tests.unit.data.golden import bitmaps, picture

LIMIT = 10**8
HEIC = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(40)


def encoded(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture(40, 30).save(buffer, kind, **options)
    return buffer.getvalue()


def twelve_bit() -> bytes:
    """A JPEG whose frame header says 12 bits; Pillow looks no further."""
    data = bytearray(encoded("JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    return bytes(data)


def odd_fields() -> bytes:
    """A BMP with bit fields that Pillow does not know."""
    data = bytearray(bitmaps(picture(40, 30))["p_32_fields"])
    data[54:66] = data[54:58] * 3
    return bytes(data)


def reasons(data: bytes) -> list[str]:
    """What everybody says of an image that cannot be read."""
    found = []
    with pytest.raises(DataError) as by_index:
        probe_image("x", data, LIMIT)
    with pytest.raises(DataError) as by_training:
        check_image("x", data, LIMIT)
    with pytest.raises(DataError) as by_evaluation:
        Picture("a.jpg", data).open("question 3")
    for caught in (by_index, by_training, by_evaluation):
        assert "\n" not in str(caught.value) and "0x" not in str(caught.value)
        found.append(str(caught.value))
    return found


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (twelve_bit(), "is a JPEG of 12 bits a channel, which cannot be read; convert it to 8"),
        (odd_fields(), "Unsupported BMP bitfields layout"),
        (encoded("PNG")[:20], "truncated"),
        (encoded("JPEG")[:20], "truncated"),
    ],
    ids=["12 bits", "bit fields", "cut PNG", "cut JPEG"],
)
def test_the_reason_is_the_true_one(data: bytes, reason: str) -> None:
    for line in reasons(data):
        assert reason.lower() in line.lower()
        assert ("truncated" in line.lower()) == ("truncated" in reason.lower())


def test_a_web_page_is_no_image() -> None:
    for data in (b"<!DOCTYPE html><html></html>", b"version https://git-lfs.github.com/spec/v1"):
        *checks, question = reasons(data)
        assert all("unknown signature" in line for line in checks)
        assert "cannot be decoded (it begins with b'" in question


@pytest.fixture
def heif(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Forgets whether pillow-heif is installed, before and after."""
    image_rules_dattn.heif_is_readable.cache_clear()
    yield monkeypatch
    image_rules_dattn.heif_is_readable.cache_clear()


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"hevc", b"mif1"])
def test_heic_without_its_package_names_the_extra(heif: pytest.MonkeyPatch, brand: bytes) -> None:
    load = importlib.import_module

    def absent(name: str, *arguments: str) -> ModuleType:
        if name == "pillow_heif":
            raise ModuleNotFoundError(name)
        return load(name, *arguments)

    heif.setattr(image_rules_dattn.importlib, "import_module", absent)
    for line in reasons(HEIC.replace(b"ftypheic", b"ftyp" + brand)):
        assert "is a HEIC image; install the extra 'heif' (pillow-heif), or convert" in line
    fault = Picture("a.heic", HEIC).fault()
    assert fault.startswith("is a HEIC image; install the extra 'heif'")


@pytest.mark.usefixtures("heif")
def test_heic_is_read_where_its_package_is(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif", reason="the extra 'heif' is not installed")
    assert image_rules_dattn.heif_is_readable()
    seen = picture(90, 60).resize((30, 20)).resize((90, 60), Image.Resampling.BICUBIC)
    seen.save(tmp_path / "a.heic", quality=-1)
    seen.save(tmp_path / "a.png")
    header = probe_image("x", (tmp_path / "a.heic").read_bytes(), LIMIT)
    assert (header.format, header.width, header.height) == ("HEIF", 90, 60)
    loader = FolderLoader(tmp_path, size=28, backend="pillow")
    tiles = loader.load([("a", "a.heic"), ("b", "a.png")]).int()
    loader.close()
    assert (tiles[0] - tiles[1]).abs().float().mean() < 8  # its colours are subsampled
    by_path = image_rules_dattn.open_image(str(tmp_path / "a.heic"))
    by_question = Picture("a.heic", tmp_path / "a.heic").open("q")
    rules = image_rules_dattn.ImageRules()
    assert image_rules_dattn.to_rgb(by_path, rules).tobytes() == by_question.tobytes()
    assert Picture("a.heic", tmp_path / "a.heic").fault() == ""
    assert torch.equal(tiles[0], tiles[0].clamp(0, 255))


def test_a_pillow_without_a_format_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda name: name != "webp")
    for line in reasons(encoded("WEBP")):
        assert "is a WebP image, which Pillow" in line and "cannot read here; convert it" in line
    check_image("x", encoded("JPEG"), LIMIT)


def test_transparency_may_be_dropped_as_llava_does(tmp_path: Path) -> None:
    """The colours under it, in every mode that has any."""
    shade = Image.new("L", (8, 8), 0)
    red = Image.new("RGB", (8, 8), (200, 0, 0))
    Image.merge("RGBA", (*red.split(), shade)).save(tmp_path / "rgba.png")
    red.save(tmp_path / "key.png", transparency=(200, 0, 0))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=1)
    drop = image_rules_dattn.ImageRules(transparency="drop")
    for name in ("rgba", "key", "palette"):
        for rules, expected in ((drop, [0, 200]), (image_rules_dattn.ImageRules(), [255])):
            loader = FolderLoader(tmp_path, size=8, backend="pillow", rules=rules)
            tile = loader.load([("a", f"{name}.png")])
            loader.close()
            assert tile.unique().tolist() == expected, name


def test_bands_over_white_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    grey = picture(60, 41).convert("L")
    image = Image.merge("RGBA", (*picture(60, 41).split(), grey))
    rules = image_rules_dattn.ImageRules()
    whole = image_rules_dattn.to_rgb(image, rules)
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    assert whole.tobytes() == Image.alpha_composite(white, image).convert("RGB").tobytes()
    monkeypatch.setattr(image_rules_dattn, "BAND", 60 * 7)
    assert image_rules_dattn.to_rgb(image, rules).tobytes() == whole.tobytes()
