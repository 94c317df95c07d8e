"""Tar shards and parquet files as they come: cut, damaged, odd, and more than may be open."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dattn_mcore.data.sources.tar import TarFile
from dattn_mcore.errors import DataError


def image(value: int = 0) -> bytes:
    """A PNG of one colour."""
    out = io.BytesIO()
    Image.new("RGB", (56, 56), (value, value, value)).save(out, "PNG")
    return out.getvalue()


def record(name: str, **more: object) -> bytes:
    """A LLaVA record as a .json member holds it."""
    turns = [{"from": "human", "value": "<image>\nwhich?"}, {"from": "gpt", "value": "7"}]
    return json.dumps({"id": name, "conversations": turns, **more}).encode()


def write_tar(path: Path, members: dict[str, bytes]) -> list[tuple[int, int]]:
    """Writes a shard; returns where each member's header starts and its data end."""
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as shard:
        return [(member.offset, member.offset_data + member.size) for member in shard]


def good_members(count: int, prefix: str = "g") -> dict[str, bytes]:
    """Members of `count` samples that can be used."""
    members = {}
    for number in range(count):
        members[f"{prefix}{number}.png"] = image(number)
        members[f"{prefix}{number}.json"] = record(f"{prefix}{number}")
    return members


def changed(raw: bytes, start: int, new: bytes) -> bytes:
    return raw[:start] + new + raw[start + len(new) :]


Damage = Callable[[bytes, int], bytes]
# What is done to a shard at byte `at`, where its third sample's header starts; what is then said.
DAMAGE: dict[str, tuple[Damage, str]] = {
    "header": (
        lambda raw, at: changed(raw, at + 148, b"999999"),
        "is damaged at byte {at}: no member's header stands there; copy or make",
    ),
    "boundary": (
        lambda raw, at: raw[:at],
        "is truncated at byte {at}, before the zeros that end it",
    ),
    "inside a header": (
        lambda raw, at: raw[: at + 200],
        "is truncated at byte {past}, inside a member's header",
    ),
    "inside data": (
        lambda raw, at: raw[: at + 512 + 40],
        "is truncated inside its member 'g2.png', which starts at byte {data}",
    ),
    "zeros in the middle": (
        lambda raw, at: changed(raw, at, bytes(512)),
        "is damaged at byte {at}: zeros stand there as at a tar's end, but data follow",
    ),
    "page": (lambda raw, at: b"<html>" * 400, "is no whole tar file"),
    "nothing": (lambda raw, at: b"", "is no whole tar file"),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_a_shard_that_is_cut_or_damaged_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.tar"
    at = write_tar(path, good_members(4))[4][0]
    damage, message = DAMAGE[name]
    path.write_bytes(damage(path.read_bytes(), at))
    for walk in (TarFile.digest, lambda file: list(TarFile.scan(file))):
        with pytest.raises(DataError) as raised:
            walk(TarFile(path))
        told = message.format(at=at, past=at + 200, data=at + 512)
        assert str(raised.value).startswith(f"'{path}' {told}")


@pytest.mark.parametrize("zeros", [512, 1024, 10240 + 512, (1 << 20) + 1024])
def test_a_shard_ends_with_zeros_however_many(tmp_path: Path, zeros: int) -> None:
    path = tmp_path / "a.tar"
    end = -(-write_tar(path, good_members(2))[-1][1] // 512) * 512
    path.write_bytes(path.read_bytes()[:end] + bytes(zeros))
    assert [place.key for place in TarFile(path).scan()] == ["g0", "g1"]
