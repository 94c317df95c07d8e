"""Good samples, and among them every kind of damage that a data set of the web has."""

import io
import json
import os

import numpy as np
from PIL import Image

GOOD = 36


def jpeg(seed=0, size=(56, 56)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90)
    return out.getvalue()


def png(size):
    out = io.BytesIO()
    Image.new("L", size).save(out, "PNG")
    return out.getvalue()


def cut(kind, share, **options):
    """A noisy image of another format, cut."""
    pixels = np.random.default_rng(97).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()[: int(len(out.getvalue()) * share)]


def truncated(share):
    whole = jpeg(99)
    return whole[: max(4, int(len(whole) * share))]


def flipped():
    """A quantisation table of zero length: a header that opens and a body that no decoder reads."""
    raw = bytearray(jpeg(98))
    place = raw.index(b"\xff\xda")
    raw[place : place + 2] = b"\xff\x00"
    return bytes(raw)


# What is wrong with an image: its bytes, and what the report must say.
BYTES = {
    "empty": (b"", "is an empty file"),
    "html": (b"<html>404 not found</html>", "is not an image (unknown signature"),
    "text": (b"version https://git-lfs.github.com/spec/v1", "is not an image (unknown signature"),
    "zeros": (b"\0" * 4000, "is not an image (unknown signature"),
    "signature-only": (b"\xff\xd8\xff", "no readable header"),
    "bomb": (png((20000, 15000)), "is too large"),
    "no-scan": (flipped(), "cannot be decoded"),
    "cut-png": (cut("PNG", 0.6), "truncated"),
    "cut-progressive": (cut("JPEG", 0.7, progressive=True), "truncated"),
    "cut-bmp": (cut("BMP", 0.5), "truncated"),
    "cut-gif": (cut("GIF", 0.5), "truncated"),
    "cut-webp": (cut("WEBP", 0.5), "damaged"),
    "broken-png": (png((56, 56))[:40] + b"\xff" * 60, "no readable header"),
    **{
        f"cut-{share:02d}": (truncated(share / 100), "truncated")
        for share in (1, 5, 20, 35, 50, 65, 80, 90, 96, 99)
    },
}
# What is wrong with a record: changes to a good one.
RECORDS = {
    "dotdot": ({"image": "../secret.jpg"}, "leaves the image folder"),
    "absolute": ({"image": "/etc/hostname"}, "is absolute"),
    "nul": ({"image": "a\0b.jpg"}, "unusable path"),
    "empty-path": ({"image": [""]}, "empty or unusable path"),
    "number-path": ({"image": 3}, "must be a path"),
    "missing": ({"image": "nowhere.jpg"}, "does not exist"),
    "other-extension": ({"image": "good-0.png"}, "'good-0.jpg' is there, with another extension"),
    "two-images": ({"image": ["good-0.jpg", "good-1.jpg"]}, "1 <image> mark(s)"),
    "no-image": ({"image": None}, "1 <image> mark(s) in the conversation but 0"),
    "no-mark": ({"conversations": ["what?", "4"]}, "0 <image> mark(s)"),
    "mark-in-answer": ({"conversations": ["what?", "<image>"]}, "stands in a gpt turn"),
    "empty-answer": ({"conversations": ["<image>", "  "]}, "every answer is empty"),
    "no-answer": ({"conversations": ["<image>"]}, "an answer must follow"),
    "no-turns": ({"conversations": []}, "non-empty list"),
    "surrogate-path": ({"image": "good-\ud800.jpg"}, "'image' holds the lone surrogate"),
    "surrogate-text": (
        {"conversations": ["<image>\ud800", "4"]},
        "turn 0 holds the lone surrogate",
    ),
    "over-budget": ({"conversations": ["<image>", "4 " * 400]}, "data.text_budget is 128"),
}
# What stands in the file instead of a record.
RAW = {
    "not UTF-8": b'{"id": "caf\xe9", "conversations": []}',
    "malformed JSON": b'{"id" "broken"}',
    "must be an object": b"[1, 2]",
    "malformed JSON (a number of thousands": b'{"id": ' + b"7" * 5000 + b"}",
}


def record(name, image, conversations=("<image>\nWhich digit is top-left?", "4")):
    turns = [
        {"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(conversations)
    ]
    return {"id": name, "image": image, "conversations": turns}


def write_corpus(folder):
    """Writes all.json and images; returns what the line of each bad sample must say.

    Keys are the sample's id, which is its place where the record has none.
    """
    images = folder / "images"
    images.mkdir()
    (folder / "secret.jpg").write_bytes(jpeg())
    lines, expected = [], {}
    for number in range(GOOD):
        (images / f"good-{number}.jpg").write_bytes(jpeg(number))
        lines.append(json.dumps(record(f"good-{number}", f"good-{number}.jpg")).encode())
    for name, (raw, reason) in BYTES.items():
        (images / f"{name}.jpg").write_bytes(raw)
        lines.append(json.dumps(record(name, f"{name}.jpg")).encode())
        expected[name] = reason
    os.mkfifo(images / "fifo.jpg")
    (images / "folder.jpg").mkdir()
    (images / "outside.jpg").symlink_to(folder / "secret.jpg")
    (images / "loop.jpg").symlink_to("loop.jpg")
    (images / "dangling.jpg").symlink_to("nothing")
    (images / "unreadable.jpg").write_bytes(jpeg())
    (images / "unreadable.jpg").chmod(0)
    (images / "locked").mkdir()
    (images / "locked" / "in.jpg").write_bytes(jpeg())
    (images / "locked").chmod(0)
    for name, reason in (
        ("fifo", "not a regular file"),
        ("folder", "is a folder"),
        ("outside", "leads to"),
        ("loop", "cannot be resolved"),
        ("dangling", "does not exist"),
        ("unreadable", "cannot be opened (Permission denied)"),
        ("locked/in", "cannot be resolved ([Errno 13] Permission denied"),
    ):
        lines.append(json.dumps(record(name, f"{name}.jpg")).encode())
        expected[name] = reason
    for name, (change, reason) in RECORDS.items():
        made = record(name, "good-0.jpg")
        if "conversations" in change:
            change = {"conversations": record("", "", change["conversations"])["conversations"]}
        lines.append(json.dumps({**made, **change}).encode())
        expected[name] = reason
    for reason, raw in RAW.items():
        lines.append(raw)
        expected[len(lines)] = reason
    # A wrong extension is no damage: what counts is what the file is.
    (images / "png.jpg").write_bytes(png((56, 56)))
    lines.append(json.dumps(record("wrong-extension", "png.jpg")).encode())
    # Bad ones among the good ones.
    order = np.random.default_rng(5).permutation(len(lines))
    (folder / "all.json").write_bytes(b"[\n" + b",\n".join(lines[i] for i in order) + b"\n]\n")
    where = {int(old) + 1: f"all.json[{new}]" for new, old in enumerate(order)}
    return {where.get(k, k) if isinstance(k, int) else k: v for k, v in expected.items()}
