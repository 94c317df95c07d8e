"""Real shapes of training files: how a test writes one, and what is expected of it."""

from __future__ import annotations

import base64
import gzip
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dattn_mcore.config.schema import DataConfig, MappingConfig, SourceConfig
from dattn_mcore.data.sources.configured import configured_sources
from dattn_mcore.data.sources.record import Sample
from dattn_mcore.data.sources.source import Source, open_source_file


def png(value: int = 0) -> bytes:
    """A picture of one colour."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(out, "PNG")
    return out.getvalue()


URI = f"data:image/png;base64,{base64.b64encode(png()).decode()}"


@dataclass(frozen=True)
class Shape:
    """One real file shape.

    Attributes:
        name: What it is.
        documented: Where its form is documented.
        file: Name of the file (or folder, of `datasets`) that the test writes.
        content: Its records; of a tar its members.
        form: What it is taken for.
        samples: What is read.
        refused: Why it is not read: the exact reason; `{path}` stands for the file.
        mapping: Of its source.
    """

    name: str
    documented: str
    file: str
    content: Any
    form: str = ""
    samples: tuple[Sample, ...] = ()
    refused: str = ""
    mapping: MappingConfig = MappingConfig()

    def row(self) -> str:
        """A row of the table in docs/data.md."""
        kind = "folder" if self.file == "saved" else self.file.partition(".")[2]
        short = self.refused.removeprefix("data.sources[0].annotations: ")
        short = short.replace("'{path}' ", "").replace("{path}", self.file)
        outcome = f"refused: {short}" if self.refused else f"read as `{self.form}`"
        # Shortened where a way out follows; marks of the page's own are taken out.
        outcome = outcome.partition("; ")[0].replace("|", "/").replace("<", "\\<")
        return f"| {self.name} | {self.documented} | {kind} | {outcome} |"


def sample(name: str, turns: tuple[str, ...], images: tuple[Any, ...] = (), **more: Any) -> Sample:
    """An expected sample."""
    return Sample(id=name, images=images, turns=turns, **more)


def write(shape: Shape, folder: Path) -> Path:
    """Writes the file of a shape."""
    path = folder / shape.file
    if shape.file == "saved":
        _saved(shape.content, path)
    elif ".tar" in shape.file:
        packed = tar_bytes(shape.content)
        path.write_bytes(gzip.compress(packed) if shape.file.endswith("gz") else packed)
    elif shape.file.endswith(".parquet"):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(shape.content), path, row_group_size=2)
    else:
        path.write_bytes(_compressed(_json(shape), shape.file))
    return path


def tar_bytes(members: Mapping[str, bytes]) -> bytes:
    """A shard."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as shard:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _json(shape: Shape) -> bytes:
    if ".jsonl" in shape.file:
        return "".join(json.dumps(record) + "\n" for record in shape.content).encode()
    return json.dumps(shape.content, indent=1).encode()


def _compressed(raw: bytes, name: str) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(raw)
    if name.endswith(".zst"):
        import pyarrow

        return pyarrow.Codec("zstd").compress(raw, asbytes=True)
    return raw


def _saved(records: list[dict[str, Any]], path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(records).save_to_disk(str(path))


def source_of(shape: Shape, path: Path, folder: Path) -> Source:
    """The source of a file that a user names without saying its form."""
    source = SourceConfig(annotations=str(path), image_folder=str(folder), mapping=shape.mapping)
    data = DataConfig(sources=(source,), index_dir=str(folder / "index"))
    return configured_sources(data)[0]


def read_all(source: Source) -> list[tuple[Sample, list[bytes]]]:
    """Every sample of a source, with the bytes of its images that lie inside the file."""
    found = []
    for number in range(len(source.files)):
        file = open_source_file(source, number)
        for place in file.scan():
            one, images = file.read(place)
            inside = [file.image(place, image) for image in images if image.length]
            found.append((one, inside))
        file.close()
    return found
