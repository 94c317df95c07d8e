"""Images of every format and colour mode that a data set of the web holds."""

from __future__ import annotations

import importlib.util
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features

HAS_DALI = bool(importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"))
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed (extra 'dali')")
BACKENDS = ["pillow", pytest.param("dali", marks=needs_dali)]


def picture(width: int, height: int) -> Image.Image:
    """Gradients, a hard edge and a patch of noise."""
    rng = np.random.default_rng(width * 1000 + height)
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x * y) % 256], -1).astype(np.uint8)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(
        0, 256, (height // 2 - height // 3, width // 2 - width // 4, 3)
    )
    pixels[height // 2 :, : width // 5] = 255
    return Image.fromarray(pixels)


def deep_png(width: int, height: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow cannot write."""
    rows = np.random.default_rng(0).integers(0, 65536, (height, width, 3)).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


def bitmaps(rgb: Image.Image) -> dict[str, bytes]:
    """BMPs that Pillow cannot write: 16 bits a pixel, bit fields, 32 bits, top row first."""
    red, green, blue = np.moveaxis(np.asarray(rgb).astype(np.uint32), -1, 0)
    five_five_five = ((red >> 3) << 10 | (green >> 3) << 5 | blue >> 3).astype("<u2")
    five_six_five = ((red >> 3) << 11 | (green >> 2) << 5 | blue >> 3).astype("<u2")
    whole = (200 << 24 | red << 16 | green << 8 | blue).astype("<u4")
    plain = np.asarray(rgb)[..., ::-1]
    masks = struct.pack("<III", 0xF800, 0x7E0, 0x1F), struct.pack("<III", 0xFF0000, 0xFF00, 0xFF)
    return {
        "p_555": _bmp(five_five_five, 16),
        "p_565": _bmp(five_six_five, 16, masks[0]),
        "p_32": _bmp(whole, 32),
        "p_32_fields": _bmp(whole, 32, masks[1]),
        "d_top_down": _bmp(plain, 24, top_down=True),
        "d_v5": _bmp(plain, 24, header=124),
    }


def _bmp(
    pixels: np.ndarray, bits: int, masks: bytes = b"", header: int = 40, top_down: bool = False
) -> bytes:
    """One BMP; `masks` are the bit fields behind its header."""
    height, width = pixels.shape[:2]
    stride = (width * bits + 31) // 32 * 4
    rows = [row.tobytes().ljust(stride, b"\0") for row in (pixels if top_down else pixels[::-1])]
    body = b"".join(rows)
    start = 14 + header + len(masks)
    sizes = struct.pack("<Iii", header, width, -height if top_down else height)
    kind = struct.pack("<HHII", 1, bits, 3 if masks else 0, len(body))
    first = b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start)
    return first + (sizes + kind).ljust(header, b"\0") + masks + body


def write_golden(folder: Path) -> None:
    """Writes the corpus of formats and colour modes. d_: DALI's part by rule, p_: Pillow's."""
    rgb = picture(131, 97)
    grey = rgb.convert("L")
    rgba = Image.merge("RGBA", (*rgb.split(), grey))
    deep_grey = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    exif = Image.Exif()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

    def save(name: str, image: Image.Image, **options: object) -> None:
        image.save(folder / name, **options)

    for subsampling in (0, 1, 2):
        save(f"d_{subsampling}.jpg", rgb, quality=90, subsampling=subsampling)
    save("d_progressive.jpg", rgb, progressive=True)
    save("d_grey.jpg", grey)
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        save(f"d_exif{orientation}.jpg", rgb, exif=exif)
    exif[0x0112] = 6
    save("d_icc.jpg", rgb, icc_profile=profile)
    save("d_exif.png", rgb, exif=exif)
    save("d_rgb.png", rgb, icc_profile=profile)
    save("d_grey.png", grey)
    save("d_palette.png", rgb.convert("P"))
    save("d_palette4.png", rgb.quantize(16), bits=4)
    save("d_onebit.png", grey.convert("1"))
    save("d_lossless.webp", rgb, lossless=True)
    save("d_lossy.webp", rgb, quality=80, exif=exif)
    save("d_rgb.bmp", rgb)
    for name, size in (
        ("tiny", (1, 1)),
        ("wide", (1500, 7)),
        ("high", (5, 900)),
        ("line", (90, 1)),
    ):
        save(f"d_{name}.png", rgb.resize(size))
        save(f"d_{name}.jpg", rgb.resize(size), quality=90)
    save("p_tiny.gif", rgb.resize((1, 1)))
    save("p_tiny_alpha.png", rgba.resize((1, 1)))
    save("p_cmyk.jpg", rgb.convert("CMYK"))
    save("p_alpha.png", rgba)
    save("p_greyalpha.png", Image.merge("LA", (grey, grey)))
    save("p_transparent.png", rgb.convert("P"), transparency=3)
    save("p_palette_alpha.png", rgb.quantize(16), transparency=bytes(range(0, 256, 16)))
    save("p_colour_key.png", rgb, transparency=(255, 255, 255))
    save("p_grey16.png", deep_grey)
    (folder / "p_rgb16.png").write_bytes(deep_png(40, 30))
    save("p_animated.png", rgb, save_all=True, append_images=[rgb.rotate(180)])
    save("p_alpha.webp", rgba, lossless=True)
    save("p_animated.webp", rgb, save_all=True, append_images=[rgb.rotate(180)], lossless=True)
    save("p_grey.bmp", grey)
    for name, data in bitmaps(rgb).items():
        (folder / f"{name}.bmp").write_bytes(data)
    save("p_plain.gif", rgb)
    save("p_animated.gif", rgb, save_all=True, append_images=[rgb.rotate(180)])
    save("p_transparent.gif", rgb.convert("P"), transparency=3)
    save("p_lzw.tif", rgb, compression="tiff_lzw")
    save("p_deflate.tif", grey, compression="tiff_adobe_deflate")
    save("p_palette.tif", rgb.convert("P"))
    save("p_onebit.tif", grey.convert("1"), compression="group4")
    save("p_cmyk.tif", rgb.convert("CMYK"))
    save("p_alpha.tif", rgba)
    save("p_big_endian.tif", rgb, big_endian=True)
    save("p_grey16.tif", deep_grey)
    save("p_rgb.jp2", rgb)
    save("p_rgb.ppm", rgb)
    save("p_small.ico", rgb.resize((64, 64)))
    if features.check("avif"):
        save("p_rgb.avif", rgb)
    padded = (folder / "d_0.jpg").read_bytes() + b"\0" * 40
    (folder / "p_tail.jpg").write_bytes(padded)
