"""Samples of the training sources that are kept for validation, chosen by a stable hash.

A sample belongs to the held-out share by the hash of its first image, or of its record where it has
none, and of `validation.salt`: the same on every machine, in every layout, and for data that are
added later. An image is named by its place below the image folder (or in its shard), not by where
that folder is mounted. A sample that is not chosen but shows an image of one that is, is withheld:
neither trained on nor validated on. So no image and no record is on both sides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dattn_mcore.config.schema import Config, ValidationConfig
from dattn_mcore.data.index.layout import digest
from dattn_mcore.data.index.store import Index, IndexedSample
from dattn_mcore.data.order import Share
from dattn_mcore.data.record_places import RecordPlaces
from dattn_mcore.data.sources.open_files import OpenFiles
from dattn_mcore.data.sources.record import Sample
from dattn_mcore.data.steps import shares_of
from dattn_mcore.errors import DataError

_LOG = logging.getLogger(__name__)
_TRAINED, _HELD_OUT, _WITHHELD = 0, 1, 2
_MOST_OPEN = 64  # files of sources
_NAMED = 3  # in an error's one line


@dataclass(frozen=True)
class HeldOut:
    """Which samples of an index are not trained on.

    Attributes:
        validated: bool [samples], the held-out share.
        withheld: bool [samples], those that show an image of it.
    """

    validated: np.ndarray
    withheld: np.ndarray

    @property
    def away(self) -> np.ndarray:
        """Bool [samples], all that are not trained on."""
        return self.validated | self.withheld


def held_out_samples(index: Index, config: Config) -> HeldOut | None:
    """The held-out share of an index; None where `validation.share` is 0.

    It is kept in the index's folder, so that records without an image are read once only.

    Raises:
        DataError: A record cannot be read, or nothing is left on one of the two sides.
    """
    validation = config.validation
    if not validation.share:
        return None
    path = index.folder / f"held_out-{_digest(validation)[:12]}.npy"
    sides: np.ndarray | None = None
    with contextlib.suppress(OSError, EOFError, ValueError):
        sides = np.load(path)
    if sides is None or sides.shape != (len(index),):
        sides = _divide(index, validation)
        temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):  # an index on a disk that cannot be written
            with open(temporary, "wb") as file:
                np.save(file, sides)
            os.replace(temporary, path)
    usable = np.asarray(index.usable) == 1
    held_out = HeldOut((sides == _HELD_OUT) & usable, (sides == _WITHHELD) & usable)
    for side, count in (
        ("held out", int(held_out.validated.sum())),
        ("trained on", int((usable & ~held_out.away).sum())),
    ):
        if not count:
            raise DataError(
                f"validation.share={validation.share:g} of {int(usable.sum()):,} usable samples "
                f"leaves none that is {side}; choose another share or validation.salt, or give "
                "validation.sources"
            )
    return held_out


def validation_config(config: Config) -> Config:
    """The configuration whose data are `validation.sources`, with nothing held out of them."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, sources=config.validation.sources),
        validation=ValidationConfig(),
    )


@contextlib.contextmanager
def named_as_validation() -> Iterator[None]:
    """Has errors inside call sources by the setting that holds them; an index knows one only."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error).replace("data.sources[", "validation.sources[")) from None


def training_shares(index: Index, config: Config) -> list[Share]:
    """What an epoch takes of each source, without what is held out.

    Raises:
        DataError: It takes nothing.
    """
    held_out = held_out_samples(index, config)
    return shares_of(index, None if held_out is None else held_out.away)


def _digest(validation: ValidationConfig) -> str:
    return digest([validation.share, validation.salt])


def _divide(index: Index, validation: ValidationConfig) -> np.ndarray:
    """The side of each sample, uint8 [samples]."""
    sides = np.zeros(len(index), np.uint8)
    files = OpenFiles(index.settings.files, _MOST_OPEN, in_order=True)
    try:
        for number in np.flatnonzero(np.asarray(index.usable)):
            sample = index.sample(int(number))
            if validation.share > _place(_key(index, sample, files), validation.salt):
                sides[number] = _HELD_OUT
            files.make_room()
    finally:
        files.close()
    shown = images_of(index, sides == _HELD_OUT)
    sides[(sides == _TRAINED) & showing(index, shown)] = _WITHHELD
    return sides


def _key(index: Index, sample: IndexedSample, files: OpenFiles) -> str:
    """What a sample is chosen by."""
    if not sample.images:
        try:
            return record_key(files.get(sample.file).read(sample.place)[0])
        except DataError as error:
            places = RecordPlaces(index.settings.files, files.get)
            first = sum(index.content["records"][: sample.file])
            where = places.where(sample.file, sample.place.offset, sample.number - first)
            raise DataError(f"{where}: annotation {sample.id!r}: {error}") from None
    image, (within, source) = sample.images[0].place, index.settings.files[sample.file]
    shard = source.files[within].name
    if source.format == "tar":
        return f"image\0{shard}\0{image.offset}"
    if image.length:
        return f"image\0{shard}\0{sample.place.offset}\0{sample.place.length}\0{image.offset}"
    return f"image\0{os.path.normpath(image.name)}"


def record_key(record: Sample) -> str:
    """What tells a record without an image from others: its texts."""
    texts = ["record", record.system, *record.turns]
    for branch in record.branches:
        texts += ["branch", branch.system, *branch.turns]
    return "\0".join(texts)


def _place(key: str, salt: str) -> float:
    """A number from 0 to 1 that looks random."""
    text = f"{salt}\0{key}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64


def images_of(index: Index, chosen: np.ndarray) -> np.ndarray:
    """Identities of the images that some samples show, uint64, sorted, each once.

    Args:
        index: Of the samples.
        chosen: Bool [samples].
    """
    return np.unique(index.images["identity"][_image_rows(index, np.flatnonzero(chosen))])


def showing(index: Index, identities: np.ndarray) -> np.ndarray:
    """Whether each sample shows one of the images, bool [samples].

    Args:
        index: Of the samples.
        identities: uint64, of images.
    """
    shows = np.zeros(len(index), bool)
    counts = index.samples["num_images"].astype(np.int64)
    owners = np.repeat(np.arange(len(index)), counts)
    rows = _image_rows(index, np.arange(len(index)))
    shows[owners[np.isin(index.images["identity"][rows], identities)]] = True
    return shows


def _image_rows(index: Index, numbers: np.ndarray) -> np.ndarray:
    """Rows of images.npy that belong to samples, in their order."""
    counts = index.samples["num_images"][numbers].astype(np.int64)
    firsts = index.samples["first_image"][numbers].astype(np.int64)
    before = np.cumsum(counts) - counts
    return np.repeat(firsts - before, counts) + np.arange(counts.sum())


def check_apart(
    training: Index, trained: np.ndarray, validation: Index, validated: np.ndarray
) -> None:
    """Refuses validation sources that share images or records with the training sources.

    Args:
        training: Index of the training sources.
        trained: Bool [samples], which of them epochs draw.
        validation: Index of the validation sources.
        validated: Bool [samples], which of them are validated on.

    Raises:
        DataError: Names the first shared ones.
    """
    shared = showing(validation, images_of(training, trained)) & validated
    if not shared.any():
        shared = _shared_records(training, trained, validation, validated)
    if shared.any():
        numbers = np.flatnonzero(shared)
        names = ", ".join(repr(name) for name in validation.ids(numbers[:_NAMED]))
        more = f" and {len(numbers) - _NAMED:,} more" if len(numbers) > _NAMED else ""
        raise DataError(
            f"validation.sources: {len(numbers):,} of {int(validated.sum()):,} samples show images "
            f"or have texts that are trained on too ({names}{more}); give samples that training "
            "does not have, or use validation.share"
        )


def _shared_records(
    training: Index, trained: np.ndarray, validation: Index, validated: np.ndarray
) -> np.ndarray:
    """Validation samples without an image whose texts are trained on, bool [samples].

    Only records of the same numbers of rows are read.
    """
    shared = np.zeros(len(validation), bool)
    numbers = np.flatnonzero(validated & (validation.samples["num_images"] == 0))
    if not len(numbers):
        return shared
    alike = np.isin(_sizes(training), _sizes(validation)[numbers])
    others = np.flatnonzero(trained & alike & (training.samples["num_images"] == 0))
    known = set(_records(training, others))
    for number, key in zip(numbers, _records(validation, numbers), strict=True):
        shared[number] = key in known
    return shared


def _sizes(index: Index) -> np.ndarray:
    """Text and supervised rows of each sample as one number."""
    rows = index.samples
    return rows["text_rows"].astype(np.uint64) << np.uint64(32) | rows["supervised"]


def _records(index: Index, numbers: np.ndarray) -> list[str]:
    files = OpenFiles(index.settings.files, _MOST_OPEN, in_order=True)
    keys = []
    try:
        for number in numbers:
            sample = index.sample(int(number))
            keys.append(record_key(files.get(sample.file).read(sample.place)[0]))
            files.make_room()
    finally:
        files.close()
    return keys
