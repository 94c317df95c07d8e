"""Tables of rows: what a table adds to its rows, and streams that end too early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dattn_mcore.data.sources.arrow import ArrowFile
from dattn_mcore.data.sources.parquet import ParquetFile
from dattn_mcore.data.sources.records.messages import MESSAGES
from dattn_mcore.errors import DataError

arrow = pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")


def call(name: str, **arguments: Any) -> dict[str, Any]:
    """A conversation in which a tool is called, with a null that was written."""
    function = {"name": name, "arguments": arguments}
    kinds = {key: {"type": "string"} for key in arguments}
    return {
        "messages": [
            {"role": "user", "content": "do", "tool_calls": None},
            {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
        ],
        "tools": [{"function": {"name": name, "parameters": {"properties": kinds}}}],
    }


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_calls_of_tools_have_no_arguments_of_other_rows(kind: str, tmp_path: Path) -> None:
    """A table's rows have the same keys: `a` and `b` stand in both, one of them null."""
    rows = [call("first", a="1"), call("second", b="2")]
    table = arrow.Table.from_pylist(rows)
    path = tmp_path / f"calls.{kind}"
    if kind == "parquet":
        __import__("pyarrow.parquet").parquet.write_table(table, path)
        opened: Any = ParquetFile(path, "", form=MESSAGES)
    else:
        with arrow.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)
        opened = ArrowFile(path, "", form=MESSAGES)
    found = [opened.raw(place) for place in opened.scan()]
    assert [row["messages"][1]["tool_calls"] for row in found] == [
        row["messages"][1]["tool_calls"] for row in rows
    ]
    assert [row["tools"] for row in found] == [row["tools"] for row in rows]
    said = [json.dumps(opened.read(place)[0].turns) for place in opened.scan()]
    assert "null" not in "".join(said)
    opened.close()


def test_a_stream_that_ends_behind_a_batch_is_not_whole(tmp_path: Path) -> None:
    table = arrow.table({"conversations": ["[]"] * 9})
    path = tmp_path / "cut.arrow"
    with arrow.ipc.new_stream(str(path), table.schema) as stream:
        ends = []
        for batch in table.to_batches(max_chunksize=3):
            stream.write_batch(batch)
            ends.append(path.stat().st_size)
    ArrowFile(path, "").close()
    whole = path.read_bytes()
    with arrow.ipc.open_stream(whole) as reader:
        reader.read_next_batch()
        rest = sum(arrow.ipc.get_record_batch_size(batch) for batch in reader)
    path.write_bytes(whole[: len(whole) - 8 - rest])
    with pytest.raises(
        DataError, match=r"no whole Arrow file \(its end mark is missing behind 1 r"
    ):
        ArrowFile(path, "")
