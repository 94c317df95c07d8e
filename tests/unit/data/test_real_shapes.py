"""Files as people have them: read rightly without a word about their form, or refused truly."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest
import yaml

from dattn_mcore.config.load import from_dict
from dattn_mcore.data.sources.record import Inside
from dattn_mcore.data.sources.records.forms import FORMS, matching, parse_record
from dattn_mcore.data.sources.records.mapping import mapped_form
from dattn_mcore.errors import DataError
from tests.unit.data import shapes_llava, shapes_messages, shapes_others
from tests.unit.data.shapes import Shape, png, read_all, source_of, write

SHAPES = (*shapes_llava.SHAPES, *shapes_messages.SHAPES, *shapes_others.SHAPES)
PAGE = Path(__file__).resolve().parents[3] / "docs" / "data.md"
JSON_TEXT = re.compile(r"`(\{.*?\})`")
HEAD = "| file | documented in | kind | outcome |\n|---|---|---|---|\n"


@pytest.fixture(autouse=True)
def optional_packages(request: pytest.FixtureRequest) -> None:
    """Skips what a package that is an extra reads."""
    shape = request.node.callspec.params.get("shape") if hasattr(request.node, "callspec") else None
    if shape is not None and shape.file.endswith((".parquet", ".zst")):
        pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
    if shape is not None and shape.file == "saved":
        pytest.importorskip("datasets", reason="`datasets`, which writes the file, is missing")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_real_shape(shape: Shape, tmp_path: Path) -> None:
    path = write(shape, tmp_path)
    if shape.refused:
        with pytest.raises(DataError) as raised:
            read_all(source_of(shape, path, tmp_path))
        assert str(raised.value) == shape.refused.replace("{path}", str(path))
        return
    source = source_of(shape, path, tmp_path)
    assert source.form == shape.form
    found = read_all(source)
    assert [one for one, _ in found] == list(shape.samples)
    for one, inside in found:
        in_file = source.format == "tar"
        expected = [image for image in one.images if in_file or isinstance(image, Inside)]
        assert len(inside) == len(expected)
        assert all(data in (png(0), png(1)) for data in inside)


def test_most_shapes_are_read() -> None:
    names = [shape.name for shape in SHAPES]
    assert len(set(names)) == len(names) >= 56
    assert sum(not shape.refused for shape in SHAPES) >= 40
    assert all(bool(shape.samples) != bool(shape.refused) for shape in SHAPES)


def table() -> str:
    """The table of docs/data.md."""
    return HEAD + "".join(f"{shape.row()}\n" for shape in SHAPES)


def test_the_page_lists_them() -> None:
    run = "run python -m tests.unit.data.test_real_shapes"
    assert f"\n\n{table()}\n" in PAGE.read_text("utf-8"), run


def test_the_examples_of_the_page_are_read() -> None:
    """A line of each form, as a user would copy it, and the settings below."""
    page = PAGE.read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| .* \|$", page, re.MULTILINE)
    examples = [(name, json.loads(one)) for name, cell in rows for one in JSON_TEXT.findall(cell)]
    assert {name for name, _ in examples} == {*FORMS} - {"webdataset"}
    for name, record in examples:
        assert matching(record) == [name]
        assert parse_record(record, "a", form=FORMS[name]).id in ("1", "a")
    blocks = re.findall(r"(?:^    .*\n)+", page.partition("## Forms of records")[2], re.MULTILINE)
    for line in blocks[0].splitlines():
        from_dict(yaml.safe_load(textwrap.dedent(line)))
    mapped = from_dict(yaml.safe_load(textwrap.dedent(blocks[1]))).data.sources
    assert [mapped_form(source.mapping).name for source in mapped] == ["mapping", "mapping"]


if __name__ == "__main__":  # writes the table into the page
    before, _, behind = PAGE.read_text("utf-8").partition(HEAD)
    PAGE.write_text(before + table() + "\n" + behind.partition("\n\n")[2], "utf-8")
