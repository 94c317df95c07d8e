"""`check`: everything that is missing, broken or too long, before a GPU is rented."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np

from dattn_mcore.config.schema import Config
from dattn_mcore.data.budgets import Fates
from dattn_mcore.data.failures import Kinds, unusable
from dattn_mcore.data.images import ImageLoader
from dattn_mcore.data.index.store import Index, open_index
from dattn_mcore.data.sample_failure import SampleFailure
from dattn_mcore.data.samples import SampleReader
from dattn_mcore.data.source_table import source_table
from dattn_mcore.data.tokenizer import Tokenizer
from dattn_mcore.errors import DataError
from dattn_mcore.units import duration, rate

_LOG = logging.getLogger(__name__)
_SHOWN = 20  # kinds of faults
_BATCH = 64  # samples whose images are decoded together
_SECONDS_BETWEEN_LINES = 5.0


def check(
    config: Config, tokenizer: Tokenizer, workers: int, decode: bool, report: Path | None
) -> int:
    """Lists what cannot be trained on.

    Args:
        config: The run.
        tokenizer: Its tokenizer, opened.
        workers: Processes that make the index where it is absent.
        decode: Decode every image too; finds damage that headers do not show.
        report: JSON lines with everything found; None: the first of each kind is shown only.

    Returns:
        Exit status: 0 where all is well, 1 where something was found.
    """
    index = open_index(config, tokenizer, workers)
    kinds, fates = Kinds(), Fates(index, config)
    per_tile = config.model.vision.rows_per_tile
    reader = SampleReader(index, tokenizer, per_tile, config.data.max_image_pixels)
    with _report(report) as lines, contextlib.closing(reader):
        for failure in _everything(index, config, fates, reader, decode):
            kinds.add(failure)
            if lines is not None:
                lines.write(json.dumps(failure.line(0)) + "\n")
    for count, first in kinds.most(_SHOWN):
        _LOG.info("%7s x %-10s  first %r: %s", f"{count:,}", first.stage, first.id, first.reason)
    found, others = kinds.counts.total(), len(kinds.counts) - _SHOWN
    if found > len(kinds.counts) or others > 0:
        more = f"and {others:,} more kinds; " if others > 0 else ""
        _LOG.info("%s%s", more, f"all are in {report}" if report else "--report FILE lists all")
    allowed = int(config.data.max_bad_share * len(index))
    _LOG.info(
        "%s samples, %s images: %s cannot be trained on (data.max_bad_share allows %s)%s",
        f"{len(index):,}",
        f"{index.content['num_images']:,}",
        f"{found:,}",
        f"{allowed:,}",
        "" if decode else "; images' headers were read, --decode decodes them",
    )
    if num_cut := int(fates.cut.sum()):
        _LOG.info(
            "%s samples are cut to data.text_budget=%d (data.over_budget=truncate)",
            f"{num_cut:,}",
            config.data.text_budget,
        )
    for line in source_table(index):
        _LOG.info("%s", line)
    return 1 if found else 0


@contextlib.contextmanager
def _report(path: Path | None) -> Iterator[TextIO | None]:
    """The file of everything that is found, if one is wanted."""
    if path is None:
        yield None
        return
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise DataError(f"--report {path} cannot be written ({error.strerror})") from None
    with file:
        yield file


def _everything(
    index: Index, config: Config, fates: Fates, reader: SampleReader, decode: bool
) -> Iterator[SampleFailure]:
    yield from unusable(index)
    yield from _over_budget(index, config, fates, reader)
    if decode:
        yield from _decoded(index, config, reader)


def _over_budget(
    index: Index, config: Config, fates: Fates, reader: SampleReader
) -> Iterator[SampleFailure]:
    for number in np.flatnonzero(fates.left_out).tolist():
        reader.make_room()
        why = f"{fates.why(number)} (data.over_budget={config.data.over_budget})"
        yield reader.failure(index.sample(number), "budget", why)


def _decoded(index: Index, config: Config, reader: SampleReader) -> Iterator[SampleFailure]:
    loader = ImageLoader.of(config)
    numbers = np.flatnonzero(np.asarray(index.usable))
    started = said = time.monotonic()
    try:
        for start in range(0, len(numbers), _BATCH):
            reader.make_room()
            samples = [index.sample(int(number)) for number in numbers[start : start + _BATCH]]
            shown = [(sample, image) for sample in samples for image in sample.images]
            _, failures = loader.load([reader.request(*pair) for pair in shown])
            for failure in failures:
                sample, image = shown[failure.index]
                yield reader.failure(sample, failure.stage, failure.reason, image)
            now, done = time.monotonic(), start + len(samples)
            if now - said >= _SECONDS_BETWEEN_LINES:
                said, per_second = now, done / (now - started)
                left = duration((len(numbers) - done) / per_second)
                _LOG.info("decoded %s samples, %s/s, ETA %s", f"{done:,}", rate(per_second), left)
    finally:
        loader.close()
