"""Tar shards and parquet files as they come: cut, damaged, odd, and more than may be open."""

from __future__ import annotations

import io
import json
import os
import resource
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dattn_mcore.config.schema import Config, SourceConfig
from dattn_mcore.data.index.store import open_index
from dattn_mcore.data.pipeline import DataPipeline
from dattn_mcore.data.sources.parquet import ParquetFile
from dattn_mcore.data.sources.tar import TarFile
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from dattn_mcore.errors import DataError

MakeConfig = Callable[..., Config]


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
        expected = message.format(at=at, past=at + 200, data=at + 512)
        assert str(raised.value).startswith(f"'{path}' {expected}")


@pytest.mark.parametrize("zeros", [512, 1024, 10240 + 512, (1 << 20) + 1024])
def test_a_shard_ends_with_zeros_however_many(tmp_path: Path, zeros: int) -> None:
    path = tmp_path / "a.tar"
    end = -(-write_tar(path, good_members(2))[-1][1] // 512) * 512
    path.write_bytes(path.read_bytes()[:end] + bytes(zeros))
    assert [place.key for place in TarFile(path).scan()] == ["g0", "g1"]


def first_of(path: Path, members: dict[str, bytes]) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Id, images and turns of a shard's only sample."""
    write_tar(path, members)
    file = TarFile(path)
    (place,) = file.scan()
    sample, images = file.read(place)
    assert tuple(found.name for found in images) == sample.images
    return sample.id, sample.images, sample.turns


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[" + record("a") + b"]", "a record must be an object, got a list"),
        (b"null", "a record must be an object, got null"),
        (b'"a caption"', "a record must be an object, got a string"),
        (b"<html>404</html>", r"malformed JSON \(Expecting value at character 0\)"),
        (b'{"id": "a"', "malformed JSON"),
        (b'{"id": ' + b"9" * 5000 + b"}", r"malformed JSON \(a number of thousands"),
        (b'{"id": "\xff"}', "not UTF-8"),
        (b'{"width": 7}', "key 'conversations' is missing"),
    ],
)
def test_a_json_member_that_is_no_record_is_no_caption(
    tmp_path: Path, text: bytes, reason: str
) -> None:
    with pytest.raises(DataError, match=f"^{reason}"):
        first_of(tmp_path / "a.tar", {"a.png": image(), "a.json": text})


def test_what_members_of_a_sample_mean(tmp_path: Path) -> None:
    path, turns = tmp_path / "a.tar", ("<image>\nwhich?", "7")
    png = {"a.png": image()}
    bom = b"\xef\xbb\xbf"
    assert first_of(path, {**png, "a.json": bom + record("x")}) == ("x", ("a.png",), turns)
    assert first_of(path, {**png, "a.JSON": record("x")})[2] == turns
    assert first_of(path, {**png, "a.txt": bom + b"{7}\n"}) == ("a", ("a.png",), ("<image>", "{7}"))
    assert first_of(path, {**png, "a.caption": b"[7]"})[2] == ("<image>", "[7]")
    # img2dataset: properties beside the caption. A record wins over a caption.
    properties = {"a.jpg": image(), "a.txt": b"a 7", "a.json": b'{"url": "u", "caption": "b"}'}
    assert first_of(path, properties) == ("a", ("a.jpg",), ("<image>", "a 7"))
    assert first_of(path, {**png, "a.txt": b"a 7", "a.json": record("x")})[2] == turns
    # macOS's own members, and a folder's.
    hidden = {"./d/._a.png": b"\0\5", "./d/a.png": image(), "./d/._a.json": b"\0\5"}
    more = {"./d/a.json": record("x"), "./d/.DS_Store": b"\0"}
    assert first_of(path, {**hidden, **more}) == ("x", ("./d/a.png",), turns)


def test_the_digest_depends_on_text_of_any_case(tmp_path: Path) -> None:
    digests = set()
    for answer in "ab":
        write_tar(tmp_path / "a.tar", {"a.PNG": image(), "a.TXT": answer.encode()})
        digests.add(TarFile(tmp_path / "a.tar").digest())
    assert len(digests) == 2


@pytest.fixture
def shards(make_config: MakeConfig, tmp_path: Path) -> Callable[..., Config]:
    """A configuration of files below `tmp_path`."""

    def make(pattern: str, **data: object) -> Config:
        sources = (SourceConfig(annotations=str(tmp_path / pattern)),)
        return make_config(sources=sources, index_dir=str(tmp_path / "index"), **data)

    return make


def test_more_shards_than_may_be_open(
    shards: Callable[..., Config], toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    for number in range(40):
        write_tar(tmp_path / f"{number:02d}.tar", good_members(1, f"s{number}-"))
    config = shards("*.tar")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, limits[1]))
        assert open_index(config, toy_tokenizer).num_usable == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
def test_the_lack_of_descriptors_is_reported_as_what_it_is(tmp_path: Path, name: str) -> None:
    if name == "a.parquet":
        pytest.importorskip("pyarrow.parquet", reason="the extra 'parquet' is not installed")
    kind = {"a.tar": TarFile, "a.parquet": lambda path: ParquetFile(path, "")}[name]
    path = tmp_path / name
    path.write_bytes(b"no shard")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        with pytest.raises(DataError, match=r"cannot be read \(Too many open files\)"):
            kind(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_shard_that_goes_during_a_run_masks_its_samples(
    shards: Callable[..., Config], toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", good_members(4, f"s{number}-"))
    config = shards("*.tar", prefetch=1)
    where = {"dp_rank": 0, "dp_size": 1, "microbatch_multiple": 1, "needs_pixels": True}
    pipeline = DataPipeline(config, toy_tokenizer, **where)
    (tmp_path / "1.tar").unlink()
    batch = pipeline.global_batch(0)
    pipeline.close()
    lost = {name for name in batch.sample_ids if name.startswith("s1")}
    assert {failure.id for failure in batch.failures} == lost != set()
    gone = f"'{tmp_path / '1.tar'}' cannot be read (No such file or directory)"
    assert all(failure.reason.endswith(gone) for failure in batch.failures)


def test_a_corrupt_corpus_of_tars(
    shards: Callable[..., Config], toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    """Good samples are used, bad ones reported with their reason, and a bad shard by its name."""
    write_tar(tmp_path / "0.tar", good_members(5))
    half = image(1)[: len(image(1)) // 3]
    bad = {
        "list": ({"list.png": image(), "list.json": b"[" + record("l") + b"]"}, "must be an obj"),
        "page": ({"page.png": image(), "page.json": b"<html>"}, "malformed JSON"),
        "lone": ({"lone.png": image()}, "has no .json or .txt member"),
        "imageless": ({"imageless.json": record("imageless")}, "1 <image> mark"),
        "empty": ({"empty.png": b"", "empty.json": record("empty")}, "image 'empty.png'"),
        "note": ({"note.png": b"no image", "note.json": record("note")}, "image 'note.png'"),
        "short": ({"short.png": half[:20], "short.json": record("short")}, "image 'short.png'"),
    }
    mixed = good_members(1, "m")
    for members, _ in bad.values():
        mixed |= members
    mixed |= good_members(1, "n")
    mixed |= {"._n0.png": b"\0", "i.jpg": image(), "i.txt": b"a 7", "i.json": b'{"url": "u"}'}
    write_tar(tmp_path / "1.tar", mixed)
    index = open_index(shards("*.tar"), toy_tokenizer)
    good = {index.sample(n).id for n in range(len(index)) if index.usable[n]}
    assert good == {*(f"g{n}" for n in range(5)), "m0", "n0", "i"}
    reasons = {entry["id"]: entry["reason"] for entry in index.bad()}
    assert reasons.keys() == bad.keys()
    for name, (_, reason) in bad.items():
        assert reason in reasons[name], name
    at = write_tar(tmp_path / "2.tar", good_members(4))[4][0]
    whole = (tmp_path / "2.tar").read_bytes()
    for damage, message in DAMAGE.values():
        (tmp_path / "2.tar").write_bytes(damage(whole, at))
        with pytest.raises(DataError) as raised:
            open_index(shards("*.tar"), toy_tokenizer)
        expected = message.format(at=at, past=at + 200, data=at + 512)
        assert str(raised.value).startswith(f"'{tmp_path / '2.tar'}' {expected}")
    (tmp_path / "2.tar").write_bytes(whole)
    assert open_index(shards("*.tar"), toy_tokenizer).num_usable == len(good) + 4
