"""The index: what it says of samples, how it is made, when it is stale; every source format."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dattn_mcore.config.load import from_dict, to_dict
from dattn_mcore.config.schema import Config, DataConfig, SourceConfig
from dattn_mcore.data.__main__ import main
from dattn_mcore.data.failures import check_share
from dattn_mcore.data.fitted_sample import fitted_sample
from dattn_mcore.data.images import ImageLoader, ImageRequest
from dattn_mcore.data.index import build
from dattn_mcore.data.index.identity import difference, fingerprint_of, identity_of
from dattn_mcore.data.index.store import Index, open_index
from dattn_mcore.data.samples import SampleReader
from dattn_mcore.data.sources.record import RecordError
from dattn_mcore.data.steps import shares_of
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from dattn_mcore.errors import DataError
from dattn_mcore.types import IGNORED_LABEL

MakeConfig = Callable[..., Config]


class Counting:
    """A tokenizer that counts what it encodes, and is interrupted after a number of texts."""

    def __init__(self, tokenizer: SentencePieceTokenizer, last: int | None = None) -> None:
        self.tokenizer, self.last, self.calls = tokenizer, last, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def encode(self, text: str) -> list[int]:
        if self.calls == self.last:
            raise KeyboardInterrupt
        self.calls += 1
        return self.tokenizer.encode(text)


def fingerprint(index: Index) -> str:
    return fingerprint_of(identity_of(index, DataConfig()))


def with_sources(config: Config, tmp_path: Path, *sources: SourceConfig) -> Config:
    data = dataclasses.replace(config.data, sources=sources, index_dir=str(tmp_path / "index"))
    return dataclasses.replace(config, data=data)


def contents(index: Index, tokenizer: SentencePieceTokenizer) -> list[Any]:
    """What the trainer would see of every sample: text, labels, layout, image bytes' size."""
    reader = SampleReader(index, tokenizer, 16, 10**8)
    seen = []
    for number in np.flatnonzero(index.usable):
        fitted = fitted_sample(index, int(number))
        (encoded,) = reader.encode(fitted)
        pixels = []
        for image in fitted.images:
            with Image.open(io.BytesIO(reader.request(fitted.indexed, image).read())) as opened:
                assert opened.size == (image.width, image.height)
                pixels.append(np.asarray(opened).tolist()[0][0])
        seen.append((fitted.indexed.id, encoded.text_ids, encoded.labels, encoded.layout, pixels))
    reader.close()
    return seen


@pytest.fixture
def records(toy_data: Path) -> list[dict[str, Any]]:
    return json.loads((toy_data / "toy.json").read_text())


def write_tar(path: Path, records: list[dict[str, Any]], images: Path, style: str) -> None:
    """style: named (json names its images), unnamed, or caption (.txt)."""
    with tarfile.open(path, "w") as shard:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))

        for record in records:
            names = record.get("image") or []
            names = [names] if isinstance(names, str) else names
            key = f"part/{record['id']}"
            for number, name in enumerate(names):
                member = f"{key}.{name}" if style == "named" else f"{key}.{number}.png"
                add(member, (images / name).read_bytes())
            if style == "caption":
                add(f"{key}.txt", record["conversations"][1]["value"].encode())
                continue
            copy = dict(record)
            if style == "unnamed":
                copy.pop("image", None)
                copy.pop("id")
            elif names:
                copy["image"] = [f"{record['id']}.{name}" for name in names]
            add(f"{key}.json", json.dumps(copy).encode())


@pytest.mark.parametrize("style", ["named", "unnamed"])
def test_tar_shards_hold_the_same_samples(
    make_config: MakeConfig,
    toy_tokenizer: SentencePieceTokenizer,
    toy_data: Path,
    tmp_path: Path,
    records: list[dict[str, Any]],
    style: str,
) -> None:
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", records[shard::2], toy_data / "images", style)
    source = SourceConfig(annotations=str(tmp_path / "*.tar"))
    index = open_index(with_sources(make_config(), tmp_path, source), toy_tokenizer)
    plain = {
        entry[0]: entry
        for entry in contents(open_index(make_config(), toy_tokenizer), toy_tokenizer)
    }
    found = contents(index, toy_tokenizer)
    assert len(found) == 40
    for entry in found:
        assert (entry[0].removeprefix("part/"), *entry[1:]) == plain[entry[0].removeprefix("part/")]


def test_tar_captions(
    make_config: MakeConfig,
    toy_tokenizer: SentencePieceTokenizer,
    toy_data: Path,
    tmp_path: Path,
    records: list[dict[str, Any]],
) -> None:
    write_tar(tmp_path / "a.tar", records[:3], toy_data / "images", "caption")
    source = SourceConfig(annotations=str(tmp_path / "a.tar"))
    config = with_sources(make_config(template="plain"), tmp_path, source)
    found = contents(open_index(config, toy_tokenizer), toy_tokenizer)
    assert [entry[4] for entry in found] == [[[n, *found[n][4][0][1:]]] for n in range(3)]
    for entry, record in zip(found, records, strict=False):
        answer = toy_tokenizer.encode(record["conversations"][1]["value"].strip())
        assert entry[1][1:-1] == tuple(answer)


def test_bad_tars(
    make_config: MakeConfig,
    toy_tokenizer: SentencePieceTokenizer,
    tmp_path: Path,
    toy_data: Path,
    records: list[dict[str, Any]],
) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, records[:4], toy_data / "images", "named")
    whole = path.read_bytes()
    config = with_sources(make_config(), tmp_path, SourceConfig(annotations=str(path)))
    for raw, message in (
        (whole[:9000], "truncated inside its member"),
        (b"<html>" * 400, "no whole tar file"),
    ):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=message):
            open_index(config, toy_tokenizer)
    compressed = SourceConfig(annotations=str(tmp_path / "a.tar.gz"))
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match="a.tar.gz' is no whole gzip file"):
        open_index(with_sources(make_config(), tmp_path, compressed), toy_tokenizer)
    nothing = SourceConfig(annotations=str(tmp_path / "b*.tar"))
    with pytest.raises(
        DataError, match=r"data.sources\[0\].annotations: pattern .* matches no file"
    ):
        open_index(with_sources(make_config(), tmp_path, nothing), toy_tokenizer)


@pytest.mark.parametrize("inside", [True, False])
def test_parquet_holds_the_same_samples(
    make_config: MakeConfig,
    toy_tokenizer: SentencePieceTokenizer,
    toy_data: Path,
    tmp_path: Path,
    records: list[dict[str, Any]],
    inside: bool,
) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = []
    for record in records:
        names = record.get("image") or []
        names = [names] if isinstance(names, str) else names
        read = [
            {"bytes": (toy_data / "images" / n).read_bytes(), "path": "/x/../" + n} for n in names
        ]
        rows.append(
            {
                "id": record["id"],
                "conversations": record["conversations"],
                "images": read if inside else names,
            }
        )
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    source = SourceConfig(
        annotations=str(tmp_path / "a.parquet"), image_folder=str(toy_data / "images")
    )
    found = contents(
        open_index(with_sources(make_config(), tmp_path, source), toy_tokenizer), toy_tokenizer
    )
    assert found == contents(open_index(make_config(), toy_tokenizer), toy_tokenizer)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    broken = SourceConfig(annotations=str(tmp_path / "b.parquet"))
    with pytest.raises(DataError, match="is no whole parquet file"):
        open_index(with_sources(make_config(), tmp_path, broken), toy_tokenizer)


def test_the_index_knows_what_encoding_gives(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer
) -> None:
    for template in ("mistral", "gemma"):
        index = open_index(make_config(template=template), toy_tokenizer)
        reader = SampleReader(index, toy_tokenizer, 16, 10**8)
        for number in range(len(index)):
            fitted = fitted_sample(index, number)
            (encoded,) = reader.encode(fitted)  # raises where the fitted layout differs
            row = index.samples[number]
            labels = [i for i, label in enumerate(encoded.labels) if label != IGNORED_LABEL]
            assert int(row["text_rows"]) == len(encoded.text_ids)
            assert (int(row["first_label"]), int(row["supervised"])) == (labels[0], len(labels))
            for budget in (3, 9, len(encoded.text_ids) - 1):
                cut = fitted_sample(index, number, budget)
                assert [one.layout for one in reader.encode(cut)] == [*cut.layouts(16)]
        reader.close()


def test_parts_in_parallel_and_after_a_kill_give_the_same_index(
    make_config: MakeConfig,
    toy_model: Path,
    toy_tokenizer: SentencePieceTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "PART", 7)
    config = make_config(index_dir=str(tmp_path / "one"), tokenizer=str(toy_model))
    one = open_index(config, toy_tokenizer)

    def folder_of(name: str) -> Config:
        data = dataclasses.replace(config.data, index_dir=str(tmp_path / name))
        return dataclasses.replace(config, data=data)

    two = open_index(folder_of("two"), toy_tokenizer, workers=2)
    every = Counting(toy_tokenizer)
    open_index(folder_of("counted"), every)
    first, second = Counting(toy_tokenizer, last=every.calls // 2), Counting(toy_tokenizer)
    with pytest.raises(KeyboardInterrupt):
        open_index(folder_of("three"), first)
    assert len(list(tmp_path.glob("three/*.partial/part-*.npz"))) >= 2
    three = open_index(folder_of("three"), second)
    # Only the part that was being made when the build was killed is made again.
    assert 0 <= first.calls + second.calls - every.calls < first.calls / 2
    for other in (two, three):
        names = ("samples.npy", "images.npy", "branches.npy", "usable.npy", "names.bin")
        for name in (*names, "bad.jsonl"):
            assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes(), name
        assert fingerprint(other) == fingerprint(one)
    assert not list(tmp_path.glob("*/*.partial"))


def test_stale_indexes_are_made_again_or_refused(
    make_config: MakeConfig, toy_data: Path, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "toy.json"
    path.write_bytes((toy_data / "toy.json").read_bytes())
    config = make_config(annotations=str(path))
    first = open_index(config, toy_tokenizer)
    made = (first.folder / "index.json").stat().st_mtime_ns
    path.touch()  # a copy of the same content
    assert fingerprint(open_index(config, toy_tokenizer)) == fingerprint(first)
    assert (first.folder / "index.json").stat().st_mtime_ns == made
    path.write_text(path.read_text().replace("which?", "WHICH?", 1))
    never = dataclasses.replace(config, data=dataclasses.replace(config.data, build_index=False))
    with pytest.raises(DataError, match="cannot be used: '.*toy.json' has changed"):
        open_index(never, toy_tokenizer)
    again = open_index(config, toy_tokenizer)
    assert again.folder == first.folder and fingerprint(again) != fingerprint(first)
    data = config.data
    found = difference(identity_of(first, data), identity_of(again, data))
    assert found == "the annotations (40 samples there, 40 here)"
    other = open_index(make_config(annotations=str(path), template="gemma"), toy_tokenizer)
    assert other.folder != first.folder  # both stay
    (again.folder / "samples.npy").write_bytes(b"")
    with pytest.raises(DataError, match="is damaged .*; remove the folder, it is made again"):
        open_index(config, toy_tokenizer)


def test_sources_are_mixed_by_weight(
    make_config: MakeConfig, toy_data: Path, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    both = [
        SourceConfig(str(toy_data / "toy.json"), str(toy_data / "images"), weight)
        for weight in (0.5, 2.0)
    ]
    config = with_sources(make_config(), tmp_path, *both)
    assert from_dict(to_dict(config)) == config
    index = open_index(config, toy_tokenizer)
    assert index.source_ranges() == [(0, 40), (40, 80)]
    assert [share.per_epoch for share in shares_of(index)] == [20, 80]
    other = with_sources(make_config(), tmp_path, both[0], dataclasses.replace(both[1], weight=1.0))
    assert open_index(other, toy_tokenizer).folder == index.folder  # weights change no index
    weighted = open_index(other, toy_tokenizer)
    assert fingerprint(weighted) != fingerprint(index)
    identities = [identity_of(each, config.data) for each in (weighted, index)]
    assert difference(*identities) == "data.sources[].weight"
    assert difference(identities[1], identities[1]) == ""


def test_weights_that_leave_no_sample_are_reported(
    make_config: MakeConfig, toy_data: Path, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    source = SourceConfig(str(toy_data / "toy.json"), str(toy_data / "images"), 0.01)
    index = open_index(with_sources(make_config(), tmp_path, source), toy_tokenizer)
    with pytest.raises(DataError, match=r"^data.sources: .* weights 0.01: .* round to 0; raise"):
        shares_of(index)


def test_a_missing_image_folder_is_reported_once(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    """Not as so many missing images."""
    folder = str(tmp_path / "none")
    index = open_index(make_config(image_folder=folder, index_dir=str(tmp_path)), toy_tokenizer)
    with pytest.raises(DataError, match=f"^data.image_folder: '{folder}' does not exist"):
        check_share(index, 0.01)


def test_a_thin_image_is_refused_by_the_index_and_the_loader_and_not_taken_for_mended(
    make_config: MakeConfig,
    toy_tokenizer: SentencePieceTokenizer,
    tmp_path: Path,
    records: list[dict[str, Any]],
) -> None:
    Image.new("L", (65_000, 1)).save(tmp_path / "00.png")
    path = tmp_path / "thin.json"
    path.write_text(json.dumps(records[:1]))
    config = make_config(
        annotations=str(path),
        image_folder=str(tmp_path),
        image_policy="pad",
        max_image_pixels=10**8,
    )
    index = open_index(config, toy_tokenizer)
    (bad,) = index.bad()
    assert bad["reason"].startswith("image '00.png' is too thin: 65000 x 1 pixels become 65000 x")
    made = (index.folder / "index.json").stat().st_mtime_ns
    again = open_index(config, toy_tokenizer)
    assert (again.folder / "index.json").stat().st_mtime_ns == made
    loader = ImageLoader.of(config)
    request = ImageRequest("image '00.png'", (tmp_path / "00.png").read_bytes)
    _, (failure,) = loader.load([request])
    loader.close()
    assert (failure.stage, failure.reason) == ("read", bad["reason"])


def test_a_long_id_is_cut_between_characters(
    make_config: MakeConfig,
    toy_tokenizer: SentencePieceTokenizer,
    tmp_path: Path,
    records: list[dict[str, Any]],
) -> None:
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{**records[0], "id": "x" + "\u00e9" * 40_000}]))
    index = open_index(make_config(annotations=str(path)), toy_tokenizer)
    assert index.ids([0]) == ["x" + "\u00e9" * 32_767]


def test_the_command(
    toy_data: Path, toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [
        f"data.annotations={toy_data / 'toy.json'}",
        f"data.image_folder={toy_data / 'images'}",
        f"data.tokenizer={toy_model}",
        "data.template=mistral",
        f"data.index_dir={tmp_path}",
        "model.vision.image_size=56",
        "data.prepare=none",
    ]
    assert main(["index", "--workers", "1", *settings]) == 0
    assert "40 samples, 40 usable, 40 images: " in capsys.readouterr().out
    # Settings may stand between flags.
    assert main(["index", "data.tokenizer=nowhere", "--again", "data.prepare=none"]) == 2
    assert capsys.readouterr().err.startswith("error: data.tokenizer: 'nowhere' does not exist")
    with pytest.raises(SystemExit):
        main(["index", "data.prepare=none", "--agian"])
    assert "unrecognized arguments: --agian" in capsys.readouterr().err


def test_text_that_no_file_name_or_tokenizer_takes_is_one_bad_sample(
    make_config: MakeConfig,
    toy_tokenizer: SentencePieceTokenizer,
    tmp_path: Path,
    toy_data: Path,
    records: list[dict[str, Any]],
) -> None:
    half = json.loads(json.dumps(records[:4]))
    half[0]["id"] = "r\ud800"
    half[1]["image"] = "\ud800.png"
    half[2]["conversations"][1]["value"] = "7 \udfff"
    text = json.dumps(half)[:-1] + ', {"id": ' + "7" * 5000 + "}]"
    (tmp_path / "half.json").write_text(text)
    index = open_index(make_config(annotations=str(tmp_path / "half.json")), toy_tokenizer)
    assert list(index.usable) == [0, 0, 0, 1, 0]
    said = [(entry["id"], entry["reason"]) for entry in index.bad()]
    assert [name for name, _ in said] == ["r?", "r1", "r2", "half.json[4]"]
    for (_, reason), what in zip(said, ("'id'", "'image'", "turn 1", "number"), strict=True):
        assert what in reason
    # A shard's member is read as a file's record is.
    half[3]["conversations"][1]["value"] = "\ud800"
    write_tar(tmp_path / "a.tar", half[3:], toy_data / "images", "named")
    config = with_sources(
        make_config(), tmp_path, SourceConfig(annotations=str(tmp_path / "a.tar"))
    )
    assert "lone surrogate" in next(open_index(config, toy_tokenizer).bad())["reason"]


def test_an_error_of_any_kind_leaves_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record's error is made from two values, which unpickling it would not know."""

    def fails(*_: Any) -> int:
        raise RecordError("no conversations", "7")

    monkeypatch.setattr(build, "_maker", object())
    monkeypatch.setattr(build, "_write_part", fails)
    with pytest.raises(DataError) as caught:
        build._work(Path("part.npz"), 0, [])
    raised = pickle.loads(pickle.dumps(caught.value))
    assert (type(raised), str(raised)) == (DataError, "no conversations")
