"""Marks in texts: where images stand, and those that other trainers and models write.

A mark that is not read would be learned as words, its image elsewhere or missing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from dattn_mcore.data.sources.record import Inside
from dattn_mcore.data.sources.records.draft import Draft, Message
from dattn_mcore.errors import DataError
from dattn_mcore.types import IMAGE_MARK

_UNREAD = {"<video>": "video", "<audio>": "sound"}  # as Qwen2.5-VL, InternVL, ms-swift write them
_NAMED = re.compile(r"<img>[^<>]{1,4096}</img>")  # as Qwen-VL's files name images in texts
# What stands for an image in the text of one model: Qwen-VL's and Llama 3.2's, Phi-3's (numbered),
# InternVL's, Gemma 3's, DeepSeek-VL's, InternLM-XComposer's.
_OF_A_MODEL = re.compile(
    r"<\|(?:image_pad|vision_start|vision_end|vision_pad|image(?:_\d{1,3})?)\|>"
    r"|<IMG_CONTEXT>|<start_of_image>|<image_soft_token>|<image_placeholder>|<ImageHere>"
)
# Likewise, and often only what a text calls an image that stands elsewhere.
_NUMBERED = re.compile(r"<image[ _-]?\d{1,3}>", re.IGNORECASE)


def check_media(texts: tuple[str, ...]) -> None:
    """Refuses what stands for a video, a sound or another model's image.

    Args:
        texts: All texts of a record.

    Raises:
        DataError: Names the mark, and how often it stands there.
    """
    whole = "\n".join(texts)
    if "<" not in whole:
        return
    for mark, medium in _UNREAD.items():
        if mark in whole:
            raise DataError(
                f"a text holds the mark {mark}, and {medium} is not read yet; only text and "
                "images are"
            )
    if found := _OF_A_MODEL.findall(whole):
        raise DataError(
            f"a text holds {_counted(found)}, which stands for an image in another model's text; "
            f"put {IMAGE_MARK} where the image stands and take the rest out"
        )


def place_images(messages: list[Message], images: Collection[object]) -> None:
    """Puts the marks of images in front of the first question where no text has any.

    Raises:
        DataError: A text has marks that are not read, so the place of the images is not known.
    """
    if not images or any(IMAGE_MARK in message.text for message in messages):
        return
    _check_numbered("\n".join(message.text for message in messages))
    for message in messages:
        if message.role == "user":
            message.text = IMAGE_MARK * len(images) + message.text
            return


def are_named(value: Any) -> bool:
    """Whether images are an object whose keys are their marks, as MiniCPM-V's files have them."""
    return isinstance(value, dict) and all(map(_NUMBERED.fullmatch, value)) and bool(value)


def place_named(
    messages: list[Message], named: Mapping[str, str | Inside], field: str
) -> list[str | Inside]:
    """Images where texts name them by their marks; in front of the first question if none does.

    Args:
        messages: Get the marks that are read.
        named: An image by each mark.
        field: How messages call the key of the images.

    Returns:
        The images in the order of their marks.

    Raises:
        DataError: Some images are named and others are not, or texts have marks of both kinds.
    """
    if any(IMAGE_MARK in message.text for message in messages):
        raise DataError(f"a text holds {IMAGE_MARK} and {field} names its images; use one way")
    shown: list[str] = []
    for message in messages:
        pieces = re.split("|".join(map(re.escape, named)), message.text)
        if len(pieces) > 1:
            shown += [one for one in _NUMBERED.findall(message.text) if one in named]
            message.text = IMAGE_MARK.join(pieces)
    if not shown:
        place_images(messages, named)
        return list(named.values())
    if missing := [mark for mark in named if mark not in shown]:
        raise DataError(f"{field} holds an image {missing[0]}, and no text has that mark")
    return [named[mark] for mark in shown]


def _check_numbered(whole: str) -> None:
    """Refuses `<image_0>` and its like."""
    if "<" in whole and (found := _NUMBERED.findall(whole)):
        raise DataError(
            f"a text holds {_counted(found)}, which may be the place of an image; write "
            f"{IMAGE_MARK} there, one for each image"
        )


def check_document(draft: Draft) -> None:
    """Checks that an interleaved document has no marks but those of its images.

    Raises:
        DataError: What is wrong.
    """
    text = draft.document or ""
    check_media((text,))
    marks = text.count(IMAGE_MARK)
    if marks != len(draft.images):
        raise DataError(
            f"{marks} {IMAGE_MARK} mark(s) in the text but {len(draft.images)} image(s) in "
            f"{draft.words.images}; a text of an interleaved document holds no marks of its own"
        )
    _note_numbered(draft, text, marks)


def _note_numbered(draft: Draft, whole: str, marks: int) -> None:
    """`<image_0>` and its like where each image has a mark: what a text calls one of them.

    It stays as words, and `check` counts it. Where there is no image, it is refused.
    """
    if "<" not in whole or (marks and marks == whole.count("<")):
        return
    if not marks or marks != len(draft.images):
        _check_numbered(whole)
    draft.ignored += [f"the words {one}" for one in dict.fromkeys(_NUMBERED.findall(whole))]


def check_marks(
    draft: Draft, system: str, texts: tuple[str, ...], answers: tuple[str, ...]
) -> None:
    """Checks that each image of a conversation has its mark, in a question.

    Args:
        draft: From the form.
        system: Text of its system turn.
        texts: All others, those of tools included.
        answers: Those of answers.

    Raises:
        DataError: What is wrong.
    """
    words, count = draft.words, len(draft.images)
    whole = "\n".join(texts)
    marks = whole.count(IMAGE_MARK)
    _note_numbered(draft, f"{system}\n{whole}" if system else whole, marks)
    if marks != count:
        raise DataError(
            f"{marks} {IMAGE_MARK} mark(s) in the conversation but {count} image(s) in "
            f"{words.images}; there must be one mark for each image"
        )
    if marks and any(IMAGE_MARK in answer for answer in answers):
        raise DataError(
            f"{IMAGE_MARK} stands in a {words.answer} {words.turn}; only {words.user} "
            f"{words.turn}s may show images"
        )
    if IMAGE_MARK in system:
        raise DataError(
            f"{IMAGE_MARK} stands in the system {words.turn}; only {words.user} {words.turn}s may "
            "show images"
        )
    if "<img>" in whole and (found := _NAMED.search(whole)):
        raise DataError(
            f"a text names an image as Qwen-VL does, {found[0][:80]!r}; give the path in "
            f"{words.images} and put {IMAGE_MARK} into the text"
        )


def _counted(found: list[str]) -> str:
    """The first kind of mark, and how often all of them stand there."""
    ((first, count), *others) = Counter(found).items()
    times = "once" if count == 1 else f"{count} times"
    return f"the mark {first} {times}" + (f" (and {len(others)} more kinds)" if others else "")
