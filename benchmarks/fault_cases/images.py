"""Image files that are damaged or made to do harm: grey tiles and one line each, or the picture."""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.fault_cases.case import Case, Workshop
from tests.distributed.corpus import BYTES

FORMATS: dict[str, dict[str, object]] = {
    "JPEG": {"quality": 90},
    "JPEG progressive": {"quality": 90, "progressive": True},
    "PNG": {},
    "GIF": {},
    "WEBP": {},
    "BMP": {},
    "TIFF": {},
}
MUTATIONS_A_FORMAT = 20
SIZE = 28


def cases(generator: random.Random) -> list[Case]:
    """Files known to be bad, and good ones of every format with random damage."""
    found = [
        Case(kind="image", name=name, run=functools.partial(_known, name=name)) for name in BYTES
    ]
    for name in FORMATS:
        for _ in range(MUTATIONS_A_FORMAT):
            seed = generator.randrange(10**6)
            run = functools.partial(_mutated, name=name, seed=seed)
            found.append(Case(kind="image", name=f"{name}, damage {seed}", run=run))
    return found


def _known(folder: Path, workshop: Workshop, name: str) -> str | None:
    raw, reason = BYTES[name]
    found = _load(raw)
    if isinstance(found, str):
        return None if reason in found else f"the reason is another: {found}"
    return "taken for a good image"


def _mutated(folder: Path, workshop: Workshop, name: str, seed: int) -> str | None:
    """Whatever the damage: a picture of the right shape, or one line."""
    _load(mutated(whole_image(name), random.Random(seed)))
    return None


def whole_image(name: str) -> bytes:
    """A noisy image of a format."""
    pixels = np.random.default_rng(1).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, name.split()[0], **FORMATS[name])  # type: ignore[arg-type]
    return out.getvalue()


def mutated(raw: bytes, generator: random.Random) -> bytes:
    """Bytes with one kind of damage, at a place where headers are as often as not."""
    data = bytearray(raw)
    near = generator.random() < 0.5
    place = generator.randrange(min(64, len(data)) if near else len(data))
    damages: list[Callable[[], None]] = [
        lambda: data.__setitem__(place, generator.randrange(256)),
        lambda: data.__setitem__(slice(place, place + 4), bytes([255] * 4)),
        lambda: data.__delitem__(slice(place, place + generator.randint(1, 64))),
        lambda: data.__delitem__(slice(place, None)),
        lambda: data.__setitem__(slice(place, place), data[: generator.randint(1, 64)]),
        lambda: data.__setitem__(slice(place, place + 16), bytes(16)),
    ]
    generator.choice(damages)()
    return bytes(data)


def _load(raw: bytes) -> str | None:
    """Loads one image as training does; returns the line where it is refused.

    Raises:
        AssertionError: the tiles have another shape, or the line is several.
    """
    loader = _loader()
    tiles, failures = loader.load([_request(raw)])
    assert tuple(tiles.shape) == (1, 3, SIZE, SIZE), f"tiles are {list(tiles.shape)}"
    if not failures:
        return None
    (failure,) = failures
    assert "\n" not in failure.reason, "a reason of several lines"
    return str(failure.reason)


@functools.cache
def _loader():  # type: ignore[no-untyped-def]
    from dattn_mcore.data.images import ImageLoader

    return ImageLoader(size=SIZE, backend="auto", threads=1)


def _request(raw: bytes):  # type: ignore[no-untyped-def]
    from dattn_mcore.data.images import ImageRequest

    return ImageRequest(who="image 'a.jpg'", read=lambda: raw)
