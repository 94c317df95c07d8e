"""The embedded data set: reading real handwriting, with nothing to download.

scikit-learn ships 1,797 handwritten digits of 8 x 8 pixels (UCI "Optical Recognition of
Handwritten Digits"). Four different digits make a mosaic of 2 x 2 cells of 28 x 28 pixels, saved
as JPEG. Since the four differ, a model that sees which digits are there but not where guesses
right in one case of four at best, whatever is asked. The align stage's mosaics show one digit by
four hands: what a digit looks like is learned before where it stands (docs/quickstart.md). The
first fifth of the file is held out: no digit of it is in a training mosaic, and, as digits of one
writer stand together, hardly a writer.

Written below the output folder:
    images/{align,train,heldout,heldout_align}/NN/NNNNN.jpg
                                            mosaics
    align.json, pretrain.json               captions that read the four digits; in order, or, of
                                            every second picture of pretrain, behind their places
    instruct.json                           questions with one short answer
    heldout_{align,pretrain,instruct}.json  the same about held-out digits, for the held-out loss;
                                            instruct has the questions of the file below
    heldout_questions.jsonl                 {question_id, image, text, category, answer}
    tokenizer.model                         SentencePiece, trained on the text above
    prepared.json                           what made it; written last
"""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dattn_mcore.config.schema import Config
from dattn_mcore.data.digits_drawing import (
    CELL_PIXELS,
    HELD_OUT_SHARE,
    draw_cells,
    load_digits,
)
from dattn_mcore.data.digits_questions import (
    Mosaic,
    all_texts,
    as_record,
    caption,
    caption_with_places,
    conversation,
    held_out_question,
)
from dattn_mcore.data.prepared_folder import prepare_folder
from dattn_mcore.data.tokenizer import train_tokenizer

_LOG = logging.getLogger(__name__)
_VERSION = 4  # raise it when the same sizes would write other files
STAGES = ("align", "pretrain", "instruct")
ANNOTATIONS = tuple(f"{stage}.json" for stage in STAGES)
_ALL_ANNOTATIONS = (*ANNOTATIONS, *(f"heldout_{stage}.json" for stage in STAGES))
_JPEG_QUALITY = 92


@dataclass(frozen=True)
class DigitsSizes:
    """What is made; the same values give the same files.

    Attributes:
        align: Captioned mosaics of the align stage, of one digit each.
        pretrain: Captioned mosaics of the pre-training stage.
        instruct: Conversations of the instruct stage.
        heldout: Mosaics of held-out digits, one question each.
        seed: Of every choice.
        vocab_size: Most ids of the tokenizer.
    """

    align: int = 4000
    pretrain: int = 12000
    instruct: int = 12000
    heldout: int = 400
    seed: int = 20250
    vocab_size: int = 384


def prepare_digits(output: str | Path, sizes: DigitsSizes | None = None) -> Path:
    """Writes the data set, unless it is there already.

    It is written to a temporary folder beside `output` and renamed when whole, so that a killed
    run leaves nothing half-made and processes that race do no harm.

    Args:
        output: Folder to make, for example `data/digits`.
        sizes: Sizes and seed; None: the defaults.

    Returns:
        The folder.

    Raises:
        DataError: The folder exists and holds something else, or cannot be written.
    """
    sizes = sizes or DigitsSizes()
    made_of = {"version": _VERSION, "plan": asdict(sizes)}  # the key of folders that exist
    return prepare_folder(Path(output), "digits", made_of, lambda folder: _write(folder, sizes))


def prepare_configured(config: Config) -> None:
    """Writes the data set that a configuration names, if it is the embedded one and absent.

    Raises:
        DataError: As `prepare_digits`.
    """
    data = config.data
    annotations = Path(data.annotations)
    embedded = data.prepare == "digits" and not data.sources and annotations.name in ANNOTATIONS
    if not embedded:
        return
    own = [Path(source.annotations) for source in config.validation.sources]
    own = [path for path in own if path.parent == annotations.parent]
    needed = [annotations, *(path for path in own if path.name in _ALL_ANNOTATIONS)]
    if not all(path.exists() for path in needed):
        _LOG.info("preparing handwritten digits in %s", annotations.parent)
        prepare_digits(annotations.parent)


def _write(folder: Path, sizes: DigitsSizes) -> None:
    """Makes `folder` with everything in it but the marker."""
    folder.mkdir()
    rng = np.random.Generator(np.random.PCG64(sizes.seed))
    images, labels = load_digits()
    held_out = round(len(labels) * HELD_OUT_SHARE)
    train_count = max(sizes.pretrain, sizes.instruct)
    heldout_images, heldout_labels = images[:held_out], labels[:held_out]
    images, labels = images[held_out:], labels[held_out:]
    train = _write_mosaics(folder, "train", images, labels, train_count, rng, vary=True)
    heldout = _write_mosaics(
        folder, "heldout", heldout_images, heldout_labels, sizes.heldout, rng, vary=False
    )
    instruct = [conversation(i, train, rng) for i in range(sizes.instruct)]
    questions = [held_out_question(i, mosaic, rng) for i, mosaic in enumerate(heldout)]
    alike = _write_mosaics(folder, "align", images, labels, sizes.align, rng, vary=True, alike=True)
    _write_records(folder, "align", [caption("align", i, m) for i, m in enumerate(alike)])
    pretrain = _captions("pretrain", train[: sizes.pretrain], rng)
    _write_records(folder, "pretrain", pretrain)
    _write_records(folder, "instruct", instruct)
    (folder / "heldout_questions.jsonl").write_text(
        "".join(json.dumps(question) + "\n" for question in questions), "utf-8"
    )
    # Last, so that all before is what it was when there was no held-out loss.
    alike = _write_mosaics(
        folder,
        "heldout_align",
        heldout_images,
        heldout_labels,
        sizes.heldout,
        rng,
        vary=False,
        alike=True,
    )
    captions = [caption("heldout-align", i, mosaic) for i, mosaic in enumerate(alike)]
    _write_records(folder, "heldout_align", captions)
    _write_records(folder, "heldout_pretrain", _captions("heldout-pretrain", heldout, rng))
    _write_records(folder, "heldout_instruct", [as_record(question) for question in questions])
    train_tokenizer(all_texts(), folder / "tokenizer.model", sizes.vocab_size)


def _captions(stage: str, mosaics: list[Mosaic], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Captions of mosaics: digits in order, or, of every second picture, behind their places."""
    return [
        caption_with_places(stage, i, mosaic, rng) if i % 2 else caption(stage, i, mosaic)
        for i, mosaic in enumerate(mosaics)
    ]


def _write_records(folder: Path, name: str, records: list[dict[str, Any]]) -> None:
    text = "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n"
    (folder / f"{name}.json").write_text(text, "utf-8")


def _write_mosaics(
    folder: Path,
    split: str,
    images: np.ndarray,
    labels: np.ndarray,
    count: int,
    rng: np.random.Generator,
    vary: bool,
    alike: bool = False,
) -> list[Mosaic]:
    """Draws and saves `count` mosaics of four digits each.

    Args:
        folder: Output folder.
        split: Folder below `images`.
        images: float32 [n, 8, 8] digits of the split.
        labels: int [n].
        count: Number of mosaics.
        rng: Source of every choice.
        vary: Also shift, scale and turn each digit a little (training only).
        alike: One digit of four hands; False: four different digits.
    """
    by_label = [np.flatnonzero(labels == digit) for digit in range(10)]
    digits = np.stack([rng.permutation(10)[:4] for _ in range(count)])
    if alike:
        digits[:] = digits[:, :1]
    draws = rng.random((count, 4))
    chosen = np.array(
        [
            [by_label[d][int(u * len(by_label[d]))] for d, u in zip(row, draw, strict=True)]
            for row, draw in zip(digits, draws, strict=True)
        ]
    )
    cells = draw_cells(images, chosen.reshape(-1), rng, vary)
    cells = cells.reshape(count, 2, 2, CELL_PIXELS, CELL_PIXELS)
    pixels = cells.transpose(0, 1, 3, 2, 4).reshape(count, 2 * CELL_PIXELS, 2 * CELL_PIXELS)
    mosaics = []
    for number, row in enumerate(digits):
        path = f"{split}/{number // 1000:02d}/{number:05d}.jpg"
        first, second, third, fourth = (int(digit) for digit in row)
        mosaics.append(Mosaic(path, (first, second, third, fourth)))
    for parent in sorted({Path(mosaic.path).parent for mosaic in mosaics}):
        (folder / "images" / parent).mkdir(parents=True)

    def save(number: int) -> None:
        picture = Image.fromarray(pixels[number]).convert("RGB")
        target = folder / "images" / mosaics[number].path
        picture.save(target, "JPEG", quality=_JPEG_QUALITY, subsampling=0)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(save, range(count)))
    return mosaics
