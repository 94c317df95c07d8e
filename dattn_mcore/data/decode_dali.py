"""Decoding with NVIDIA DALI: one pipeline, on the CPU or (device="gpu") on the GPU's decoder.

DALI takes what training sets are made of and what it decodes bit for bit like Pillow; the rest
goes to Pillow by the rule of `suits_dali`. DALI has no way to skip a bad image: if a batch fails,
each image is tried alone, first here, then in Pillow, so that the fate of an image never depends
on its neighbours. A decoder that refuses several good images in a row is given up: DALI's of the
GPU for that of the CPU, that for Pillow.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dattn_mcore.data.decode_pillow import PillowDecoder
from dattn_mcore.data.image_files import ImageFile
from dattn_mcore.data.image_orientation import turned
from dattn_mcore.errors import DataError, first_line
from dattn_mcore.parallel.platform import wait_for_stream

_LOG = logging.getLogger(__name__)
_MODES = {
    "JPEG": ("RGB", "L"),
    "PNG": ("RGB", "L", "P", "1"),
    "WEBP": ("RGB",),
    "BMP": ("RGB",),
}
_MAX_BATCH = 64
_SHOWN = 200  # characters of what DALI says
_IN_A_ROW = 4  # images that a decoder refuses and Pillow decodes before it is given up
# Pixels of one DALI batch. DALI keeps the memory of its largest batch for good: 32 megapixels are
# 96 MB. A larger image is decoded alone, by Pillow, which gives the memory back.
_MAX_BATCH_PIXELS = 32_000_000


def suits_dali(image: ImageFile) -> bool:
    """Says whether DALI decodes this image; everything else goes to Pillow.

    DALI takes single-frame JPEG (colour, grey), PNG, WebP and BMP of at most 8 bits a channel
    without transparency, that end where their format says and have at most 32 megapixels. Pillow
    takes GIF, AVIF, HEIC, ICO, TIFF, JPEG 2000, PNM (refused by DALI, or rare), CMYK (DALI is off
    by one), 16 bits a channel, BMP of 16 or 32 bits a pixel or with bit fields (DALI scales their
    channels otherwise, or lays them out otherwise), transparency (the run's rule, which DALI does
    not know), animations, and files whose end is not where it should be (DALI fills the rest with
    grey).
    """
    return (
        image.mode in _MODES.get(image.format, ())
        and not image.transparent
        and not image.animated
        and image.plain
        and image.ends_whole
        and image.width * image.height <= _MAX_BATCH_PIXELS
    )


class DaliDecoder:
    """Decodes lists of images with one DALI pipeline, built on first use."""

    name = "dali"

    def __init__(self, threads: int, device: str = "cpu", device_id: int | None = None) -> None:
        """DALI must be installed.

        Args:
            threads: CPU threads of the pipeline.
            device: `cpu`, or `gpu` for decoding on the GPU (tensors are returned there).
            device_id: Index of that GPU; None: the first.
        """
        self._threads = max(threads, 1)
        # Where DALI decodes, and where it does once that has been given up; none is left: Pillow.
        self._places: list[tuple[str, int | None]] = [("cpu", None)]
        if device == "gpu":
            self._places.insert(0, ("gpu", device_id or 0))
        self._pipeline: Any = None
        self._refused = 0  # good images, in a row
        self._pillow = PillowDecoder(threads)

    def decode(self, images: Sequence[ImageFile]) -> list[Tensor | DataError]:
        """Returns for each image uint8 [3, height, width] RGB, or why it cannot be decoded."""
        decoded: list[Tensor | DataError | None] = [None] * len(images)
        here = [index for index, image in enumerate(images) if suits_dali(image)]
        for batch in _batches(here, images):
            results = self._decode_batch([images[index] for index in batch])
            for index, result in zip(batch, results, strict=True):
                decoded[index] = result
        rest = [index for index, result in enumerate(decoded) if result is None]
        by_pillow = self._pillow.decode([images[index] for index in rest])
        for index, result in zip(rest, by_pillow, strict=True):
            decoded[index] = result
        return [result for result in decoded if result is not None]

    def close(self) -> None:
        """Gives the pipeline and its memory back."""
        self._pipeline = None
        self._pillow.close()

    def _decode_batch(self, images: Sequence[ImageFile]) -> list[Tensor | DataError]:
        """Decodes a batch; an image that DALI cannot decode even alone is Pillow's."""
        if not self._places:
            return self._pillow.decode(images)
        decoded: list[Tensor | DataError] = []
        try:
            decoded += self._run(images)
        except Exception as error:  # noqa: BLE001  (DALI raises classes of its own)
            self._pipeline = None  # never trust a pipeline after a failed iteration
            if len(images) == 1:
                return self._refused_one(images[0], error)
            return [result for image in images for result in self._decode_batch([image])]
        self._refused = 0
        return decoded

    def _refused_one(self, image: ImageFile, error: Exception) -> list[Tensor | DataError]:
        """Leaves an image to Pillow; gives DALI up where it refuses good images in a row."""
        _LOG.warning("%s: DALI refuses it, Pillow decides", image.who)
        _LOG.debug("DALI said: %s", error)
        decoded = self._pillow.decode([image])
        if isinstance(decoded[0], Tensor):
            self._refused += 1
        if self._refused == _IN_A_ROW:
            (device, _), self._refused = self._places.pop(0), 0
            _LOG.warning(
                "DALI's decoder on the %s refuses %d good images in a row (%s); it is given up, "
                "images are decoded on the CPU%s",
                device.upper(),
                _IN_A_ROW,
                first_line(error)[:_SHOWN],
                "" if self._places else " by Pillow",
            )
        return decoded

    def _run(self, images: Sequence[ImageFile]) -> list[Tensor]:
        if self._pipeline is None:
            self._pipeline = _build_pipeline(self._threads, *self._places[0])
        encoded = [np.frombuffer(image.data, np.uint8) for image in images]
        self._pipeline.feed_input("encoded", encoded)
        (output,) = self._pipeline.run()
        # Copies: DALI may reuse its output buffers at the next iteration. On a GPU a copy only
        # stands in the stream's queue when the call returns, behind whatever training put there.
        copies = [_copy(torch.from_dlpack(output[i]), image) for i, image in enumerate(images)]
        wait_for_stream(copies[0].device)
        return [copy.permute(2, 0, 1) for copy in copies]


def _copy(pixels: Tensor, image: ImageFile) -> Tensor:
    """A copy of DALI's pixels [height, width, 3], upright where the run's rules say so."""
    upright = turned(pixels, image.orientation)
    return upright.contiguous() if upright.data_ptr() != pixels.data_ptr() else upright.clone()


def _batches(indexes: Sequence[int], images: Sequence[ImageFile]) -> Iterator[list[int]]:
    """Cuts a list of images into batches bounded by count and by pixels."""
    batch: list[int] = []
    pixels = 0
    for index in indexes:
        size = images[index].width * images[index].height
        if batch and (len(batch) == _MAX_BATCH or pixels + size > _MAX_BATCH_PIXELS):
            yield batch
            batch, pixels = [], 0
        batch.append(index)
        pixels += size
    if batch:
        yield batch


def _build_pipeline(threads: int, device: str, device_id: int | None) -> Any:
    """Builds the decode pipeline.

    EXIF orientation is not left to DALI, which looks for it in fewer places than Pillow does: what
    the header check found is applied to the pixels. On the GPU, `jpeg_fancy_upsampling` keeps
    chroma as the CPU decoders make it.
    """
    dali: Any = importlib.import_module("nvidia.dali")
    fn: Any = importlib.import_module("nvidia.dali.fn")
    pipeline = dali.Pipeline(
        batch_size=_MAX_BATCH, num_threads=threads, device_id=device_id, prefetch_queue_depth=1
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=dali.types.UINT8, ndim=1)
        options = {"jpeg_fancy_upsampling": True} if device == "gpu" else {}
        pipeline.set_outputs(
            fn.decoders.image(
                encoded,
                device="mixed" if device == "gpu" else "cpu",
                output_type=dali.types.RGB,
                adjust_orientation=False,
                use_fast_idct=False,
                **options,
            )
        )
    pipeline.build()
    return pipeline
