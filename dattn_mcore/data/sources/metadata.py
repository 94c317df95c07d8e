"""Known metadata: what a sample may hold beside its text and images, and training leaves aside.

Whatever is neither used nor known makes its sample bad, with its name: a question, an image or a
video that is dropped in silence is wrong training data that counts as trained. `data.metadata_keys`
adds names to those below. A key that holds nothing (null, "", [], {}) counts as absent.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from dattn_mcore.errors import DataError

# Where a sample comes from, and what it was made with: names that public data sets use.
_ORIGIN = (
    "model",
    "source",
    "data_source",
    "dataset",
    "dataset_name",
    "data_type",
    "origin",
    "url",
    "license",
    "language",
    "lang",
    "split",
    "category",
    "task",
    "task_name",
    "task_type",
    "type",
    "metadata",
    "meta",
    "question_id",
    "prompt_id",
    "sample_id",
    "image_id",
    "timestamp",
    "version",
)
# Properties of images, as InternVL's records and img2dataset's have them, LAION's columns included.
_IMAGE = (
    "width",
    "height",
    "width_list",
    "height_list",
    "image_width",
    "image_height",
    "original_width",
    "original_height",
    "exif",
    "md5",
    "sha256",
    "hash",
    "phash",
    "key",
    "uid",
    "status",
    "error_message",
    "caption",
    "similarity",
    "punsafe",
    "pwatermark",
    "nsfw",
    "aesthetic",
    "aesthetic_score",
    "clip_b32_similarity_score",
    "clip_l14_similarity_score",
)
METADATA = frozenset((*_ORIGIN, *_IMAGE))
_WAY_OUT = "name it in data.metadata_keys if training may leave it aside"
_UNREAD = {
    **dict.fromkeys(("video", "video_url", "video_path", "mp4", "webm", "mkv", "mov"), "a video"),
    **dict.fromkeys(("videos", "video_urls", "video_paths"), "videos"),
    **dict.fromkeys(("audio", "audio_url", "audio_path", "input_audio"), "a sound"),
    **dict.fromkeys(("wav", "mp3", "flac", "ogg", "m4a"), "a sound"),
    **dict.fromkeys(("audios", "audio_urls", "audio_paths"), "sounds"),
}


def known_metadata(more: Iterable[str]) -> frozenset[str]:
    """Names of metadata, with those of `data.metadata_keys`; case does not matter."""
    return METADATA | {name.casefold().removeprefix(".") for name in more}


def left_aside(
    found: Mapping[str, Any], used: Collection[str], known: Collection[str], where: str = ""
) -> list[str]:
    """The keys that are not used and known metadata.

    Args:
        found: Keys and values.
        used: Keys that are read.
        known: From `known_metadata`.
        where: What messages put behind a key's name (" of 'a.json'").

    Raises:
        DataError: A key is neither used nor known.
    """
    names = [key for key, value in found.items() if key not in used and is_filled(value)]
    for name in names:
        if name.casefold() not in known:
            raise DataError(unused(f"key '{name}'{where}", name))
    return names


def is_filled(value: Any) -> bool:
    """Whether a JSON value holds anything: 0 and false do."""
    return value is not None and not (isinstance(value, str | list | dict) and not value)


def unused(what: str, name: str) -> str:
    """The reason a sample is bad that holds more than is used.

    Args:
        what: How messages call what is not used.
        name: Its key, or the ending of its file.
    """
    medium = _UNREAD.get(name.casefold())
    if medium is None:
        return f"{what} is neither used nor known metadata; {_WAY_OUT}"
    verb = "are" if medium.endswith("s") else "is"
    return f"{what} holds {medium}, which {verb} not read yet; only text and images are"
