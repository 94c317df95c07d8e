"""`preview`: samples as the model will see them, in one page.

Each sample shows its images as they are, the tiles they are cut into, and the text rows with the
template around them: what is supervised, what is masked, what is a special token, and where each
image stands.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from dattn_mcore.config.schema import Config
from dattn_mcore.data.budgets import Fates
from dattn_mcore.data.fitted_sample import FittedSample, fitted_sample
from dattn_mcore.data.image_rules import rules_of
from dattn_mcore.data.images import ImageLoader
from dattn_mcore.data.index.store import Index, open_index
from dattn_mcore.data.pages.html import escape, page, picture, write_page
from dattn_mcore.data.run_order import order_of_run
from dattn_mcore.data.samples import SampleReader
from dattn_mcore.data.templates import EncodedSample
from dattn_mcore.data.tokenizer import Tokenizer
from dattn_mcore.errors import DataError
from dattn_mcore.hf.image_rules_dattn import ImageRules, to_rgb
from dattn_mcore.types import IGNORED_LABEL

_WIDTH = 280  # pixels of an image on the page
_TILE = 112
_LEGEND = (
    '<p class="text"><span class="supervised">predicted, counts in the loss</span> '
    '<span class="masked">read only</span> <span class="special">special token</span> '
    '<span class="image">image</span></p>'
)


def write_preview(
    config: Config,
    tokenizer: Tokenizer,
    output: Path,
    workers: int,
    count: int,
    ids: Sequence[str] | None,
) -> None:
    """Writes the page.

    Args:
        config: The run.
        tokenizer: Its tokenizer, opened.
        output: The page.
        workers: Processes that make the index where it is absent.
        count: Samples to show, in the order the run takes them.
        ids: Annotation ids to show instead.

    Raises:
        DataError: An id that is not there, or a page that cannot be written.
    """
    index = open_index(config, tokenizer, workers)
    data, vision = config.data, config.model.vision
    numbers, fates = _chosen(index, config, count, ids), Fates(index, config)
    reader = SampleReader(index, tokenizer, vision.rows_per_tile, data.max_image_pixels)
    loader = ImageLoader.of(config)
    body = [
        f'<p class="note">template {escape(data.template)}, images {escape(data.image_policy)} '
        f"to {vision.image_size} pixels, {vision.rows_per_tile} visual rows a tile, "
        f"{index.num_usable:,} of {len(index):,} samples usable</p>{_LEGEND}"
    ]
    try:
        for number in numbers:
            fitted = fates.fit(number)
            note = ""
            if fitted is None:
                note = f"left out (data.over_budget={data.over_budget}): {fates.why(number)}"
                fitted = fitted_sample(index, number)
            elif fates.cut[number]:
                note = (
                    f"cut: it has {fitted.indexed.text_rows} text rows (data.over_budget=truncate)"
                )
            body += _sample(reader, loader, tokenizer, fitted, rules_of(data), note)
    finally:
        loader.close()
        reader.close()
    write_page(output, page("Samples as the model sees them", body))


def _chosen(index: Index, config: Config, count: int, ids: Sequence[str] | None) -> list[int]:
    if not ids:
        order = order_of_run(config, index)
        return order.numbers(0, max(1, min(count, order.epoch_size)))
    wanted, found = set(ids), []
    for number in range(len(index)):
        if index.usable[number] and index.name(index.samples[number]) in wanted:
            found.append(number)
    missing = wanted - {index.name(index.samples[number]) for number in found}
    if missing:
        raise DataError(
            f"--id {sorted(missing)[0]}: no usable sample has this id; `check` lists the others"
        )
    return found


def _sample(
    reader: SampleReader,
    loader: ImageLoader,
    tokenizer: Tokenizer,
    fitted: FittedSample,
    rules: ImageRules,
    note: str,
) -> Iterator[str]:
    indexed = fitted.indexed
    try:
        texts = reader.encode(fitted)
    except (DataError, OSError) as error:
        said = f"annotation {indexed.id!r}: {error}"
        raise DataError(reader.failure(indexed, "read", said).reason) from None
    branches = f" in {len(texts)} branches" if len(texts) > 1 else ""
    predicted = sum(label != IGNORED_LABEL for one in texts for label in one.labels)
    requests = [reader.request(indexed, image) for image in fitted.images]
    tiles, failures = loader.load(requests)
    yield (
        f'<section class="sample"><h2>{escape(indexed.id)}</h2><p class="note">sample '
        f"{indexed.number:,}: {fitted.text_rows} text rows{branches}, "
        f"{texts[0].visual_rows} visual rows, {predicted} predicted</p>"
    )
    if note:
        yield f'<p class="bad">{escape(note)}</p>'
    for failure in failures:
        image = fitted.images[failure.index]
        said = reader.failure(indexed, failure.stage, failure.reason, image).reason
        yield f'<p class="bad">{escape(said)}</p>'
    failed = {failure.index for failure in failures}
    first = 0
    for number, (image, request) in enumerate(zip(fitted.images, requests, strict=True)):
        grid = f", canvas {image.grid[0]} x {image.grid[1]}" if image.grid[0] else ""
        yield (
            f'<p class="note">image {number + 1}: {escape(image.place.name)}, {image.width} x '
            f"{image.height} pixels, {image.num_tiles} tile(s){grid}</p>"
        )
        shown = "" if number in failed else _original(request.read(), image.place.name, rules)
        mine = tiles[first : first + image.num_tiles]
        first += image.num_tiles
        cut = "".join(_tile(tile) for tile in mine)
        yield f'<p>{shown}</p><p class="tiles">{cut}</p>'
    for number, encoded in enumerate(texts):
        if branches:
            yield f'<p class="note">branch {number}</p>'
        yield f'<p class="text">{_text(tokenizer, encoded)}</p>'
    yield "</section>"


def _original(data: bytes, name: str, rules: ImageRules) -> str:
    with Image.open(io.BytesIO(data)) as opened:
        shown = to_rgb(opened, rules)
        shown.thumbnail((2 * _WIDTH, 2 * _WIDTH))
        return picture(shown, "JPEG", min(_WIDTH, shown.width), name)


def _tile(tile: Tensor) -> str:
    return picture(Image.fromarray(tile.permute(1, 2, 0).cpu().numpy()), "PNG", _TILE)


def _text(tokenizer: Tokenizer, encoded: EncodedSample) -> str:
    """The text rows, coloured; an image where it stands."""
    parts, row, image = [], 0, 0
    rows = list(encoded.image_rows)
    for is_visual, count in encoded.layout:
        if is_visual:
            while count > 0:  # neighbouring images share a run
                parts.append(f'<span class="image">[image {image + 1}: {rows[image]} rows]</span>')
                count -= rows[image]
                image += 1
        else:
            parts.append(_run(tokenizer, encoded, row, row + count))
            row += count
    return "".join(parts)


def _run(tokenizer: Tokenizer, encoded: EncodedSample, start: int, end: int) -> str:
    """Text rows of one colour are decoded together, so that pieces of a character meet."""
    special = {tokenizer.eos_id: "<eos>"}
    if tokenizer.has_bos:
        special[tokenizer.bos_id] = "<bos>"
    for name in ("[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>"):
        try:
            special[tokenizer.special_id(name)] = name
        except DataError:
            continue
    groups: list[tuple[str, bool, list[int]]] = []
    for row in range(start, end):
        predicted = row > 0 and encoded.labels[row - 1] != IGNORED_LABEL
        kind = "supervised" if predicted else "masked"
        is_special = encoded.text_ids[row] in special
        if groups and not is_special and groups[-1][:2] == (kind, False):
            groups[-1][2].append(encoded.text_ids[row])
        else:
            groups.append((kind, is_special, [encoded.text_ids[row]]))
    parts = []
    for kind, is_special, ids in groups:
        text = special[ids[0]] if is_special else tokenizer.decode(ids)
        shown = escape(text).replace("\n", "&crarr;\n")
        parts.append(f'<span class="{kind}{" special" if is_special else ""}">{shown}</span>')
    return "".join(parts)
