"""The picture of a step: whose time is whose."""

import gzip
import json

from benchmarks import trace_picture


def event(name, ts, dur, tid=1, cat="cpu_op"):
    return {"name": name, "ts": ts, "dur": dur, "tid": tid, "cat": cat}


STEP = event("step 2", 100, 100, cat="user_annotation")
EVENTS = [
    event("early", 50, 10),
    STEP,
    event("linear", 110, 40),
    event("mm", 115, 20),
    event("copy", 117, 5),
    event("mm", 140, 8),
    event("mm", 120, 60, tid=2),
    event("linear", 160, 10),
    event("late", 201, 5),
    {"name": "no duration", "ph": "M"},
]


def test_own_time_leaves_out_what_is_called():
    found = trace_picture.operations(EVENTS, STEP)
    assert [one["name"] for one in found] == ["linear", "mm", "copy", "mm", "linear", "mm"]
    assert trace_picture.own_times(found) == {"linear": 22, "mm": 83, "copy": 5}
    assert trace_picture.depths(found) == [0, 1, 2, 1, 0, 0]


def test_a_picture_is_written_and_an_unknown_step_is_one_line(tmp_path, capsys):
    trace = tmp_path / "trace.json.gz"
    with gzip.open(trace, "wt") as file:
        json.dump({"traceEvents": EVENTS}, file)
    picture = tmp_path / "picture.png"
    assert trace_picture.main([str(trace), "--step", "2", "--out", str(picture)]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert trace_picture.main([str(trace), "--step", "3", "--out", str(picture)]) == 2
    assert capsys.readouterr().err == f"error: {trace} has no step 3\n"
