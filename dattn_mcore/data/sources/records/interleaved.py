"""Documents of texts and images in turn, learned as a whole: OBELICS and MMC4.

OBELICS: `{texts: [...], images: [...]}`, two lists of one length, of which one holds null where the
other holds something. MMC4: `{text_list: [...], image_info: [{image_name, matched_text_index}]}`;
an image stands in front of the text that it is matched to, as OpenFlamingo puts it.
Sources: the data set cards of HuggingFaceM4/OBELICS and of MMC4.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dattn_mcore.data.sources.metadata import is_filled
from dattn_mcore.data.sources.record import Inside, kind
from dattn_mcore.data.sources.records.draft import (
    Draft,
    Form,
    Words,
    list_of,
    object_of,
    text_of,
    turn_metadata,
)
from dattn_mcore.data.sources.records.images import image_of
from dattn_mcore.errors import DataError
from dattn_mcore.types import IMAGE_MARK

_OF_AN_IMAGE = frozenset(("image_name", "matched_text_index"))
# What MMC4 says of an image beside.
_ABOUT = frozenset(
    ("raw_url", "matched_sim", "face_detections", "width", "height", "image_id", "similarity")
)


def _read(record: Mapping[str, Any], known: Collection[str]) -> Draft:
    if is_filled(record.get("text_list")):
        return _mmc4(record, known)
    texts = list_of(record.get("texts"), "'texts'")
    shown = record.get("images")
    if not isinstance(shown, list) or len(shown) != len(texts):
        size = len(shown) if isinstance(shown, list) else kind(shown)
        raise DataError(
            f"'texts' has {len(texts)} entries and 'images' {size}; they must be as many, null "
            "where the other list holds something"
        )
    pieces: list[str] = []
    images: list[str | Inside] = []
    for number, (text, image) in enumerate(zip(texts, shown, strict=True)):
        if is_filled(text) == is_filled(image):
            what = "both" if is_filled(text) else "neither of them"
            raise DataError(
                f"entry {number}: {what} of 'texts' and 'images' hold something; one must"
            )
        if is_filled(text):
            pieces.append(text_of(text, f"'texts'[{number}]"))
        else:
            images.append(image_of(image, f"'images'[{number}]"))
            pieces.append(IMAGE_MARK)
    return Draft([], images, Words(images="'images'"), document="\n\n".join(pieces))


def _mmc4(record: Mapping[str, Any], known: Collection[str]) -> Draft:
    texts = list_of(record.get("text_list"), "'text_list'")
    ignored: list[str] = []
    before: list[list[str | Inside]] = [[] for _ in texts]
    for number, info in enumerate(record.get("image_info") or []):
        where = f"image {number}"
        found = object_of(info, where)
        about = {*known, *_ABOUT}
        turn_metadata(found, _OF_AN_IMAGE, (where, "image_info"), about, ignored)
        index = found.get("matched_text_index")
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(texts):
            raise DataError(
                f"{where}: 'matched_text_index' is {index!r}; it must be from 0 to {len(texts) - 1}"
            )
        before[index].append(image_of(found.get("image_name"), f"{where}: 'image_name'"))
    pieces = [
        IMAGE_MARK * len(images) + text_of(text, f"'text_list'[{number}]")
        for number, (text, images) in enumerate(zip(texts, before, strict=True))
    ]
    images = [image for own in before for image in own]
    words = Words(images="'image_info'")
    return Draft([], images, words, document=" ".join(pieces), ignored=ignored)


def _matches(record: Mapping[str, Any]) -> bool:
    if isinstance(record.get("text_list"), list):
        return "image_info" in record
    texts, images = record.get("texts"), record.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or not texts:
        return False
    return all(text is None or isinstance(text, str) for text in texts)


INTERLEAVED = Form(
    name="interleaved",
    used=frozenset(("id", "texts", "images", "text_list", "image_info", "weight")),
    image_key="images",
    image_keys=("images", "image_info"),
    ways=(("texts", "images"), ("text_list", "image_info")),
    matches=_matches,
    read=_read,
    metadata=frozenset(("general_metadata", "similarity_matrix", "could_have_url_duplicate")),
)
