"""All records of a JSON file at once, as tests want them; the first bad one raises."""

from __future__ import annotations

from pathlib import Path

from dattn_mcore.data.sources.json_file import JsonFile
from dattn_mcore.data.sources.record import Sample
from dattn_mcore.errors import DataError


def read_json(path: Path) -> list[Sample]:
    file = JsonFile(path, "")
    samples = []
    for number, place in enumerate(file.scan()):
        try:
            samples.append(file.read(place)[0])
        except DataError as error:
            raise DataError(f"{file.line(place.offset)}, record {number}: {error}") from None
    file.close()
    return samples
