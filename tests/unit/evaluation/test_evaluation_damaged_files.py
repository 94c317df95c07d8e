"""Every file of every benchmark, damaged in every place: one line, never a traceback."""

import json

import pytest

from dattn_mcore.errors import DattnError
from dattn_mcore.evaluation.answer_files import AnswerStore, read_answers_for
from dattn_mcore.evaluation.benchmarks import ALL, Options, make_benchmark
from dattn_mcore.evaluation.benchmarks.mmstar import MmStar
from dattn_mcore.evaluation.check import check
from tests.unit.evaluation import trees

LEFT_OUT = object()
JUNK = (LEFT_OUT, None, 1, 0.5, "", "x", [], [1], {}, {"x": 1}, "\ud800")


def places(value, path=()):
    """Every place in a JSON value; of a list, its first two entries."""
    yield path
    inner = value.items() if isinstance(value, dict) else ()
    inner = list(enumerate(value))[:2] if isinstance(value, list) else inner
    for name, part in inner:
        yield from places(part, (*path, name))


def changed(value, path, junk):
    value = json.loads(json.dumps(value))
    *way, last = path
    place = value
    for name in way:
        place = place[name]
    if junk is LEFT_OUT:
        del place[last]
    else:
        place[last] = junk
    return value


def damaged(path):
    """Contents that a file might have instead of its own."""
    raw = path.read_bytes()
    yield from (b"", raw[: len(raw) // 2], b"\xff\xfe\x00" + raw)
    if path.suffix == ".tsv":
        for junk in (b"", b"x", b"\x00", b"9" * 30):
            yield raw.replace(b"0\t", junk + b"\t", 1)
            yield raw.replace(b"A\t", junk + b"\t", 1)
    elif path.suffix == ".txt":
        yield from (b"a\tb\n", b"\t\n", b"Is it?\tYes\n")
    elif path.suffix in (".json", ".jsonl"):
        try:
            value, joined = json.loads(raw), json.dumps
        except ValueError:  # JSON lines, also where the name says json
            value = [json.loads(line) for line in raw.splitlines()]
            joined = lines
        yield b"[" * 100_000
        for junk in JUNK[1:]:
            yield json.dumps(junk).encode()
        for place in places(value):
            for junk in JUNK if place else ():
                yield joined(changed(value, place, junk)).encode()


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def only_one_line(action, *arguments):
    """Runs it; a mistake may be reported in one line, anything else is a defect."""
    try:
        action(*arguments)
    except DattnError as error:
        assert "\n" not in str(error)
        return False
    return True


def use(benchmark, folder):
    """All that a benchmark does with its files."""
    check(benchmark)
    answers = ["A"] * len(benchmark.rows)
    if benchmark.judged:
        benchmark.conversations(answers)
    elif benchmark.scores:
        benchmark.score(answers)
    if benchmark.submits:
        benchmark.submit(answers, folder, "model")


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        *((kind, trees.MAKERS[kind.folder]) for kind in ALL),
        (MmStar, trees.mmstar_tsv),
    ],
    ids=lambda x: getattr(x, "name", x.__name__),
)
def test_files_of_a_benchmark(tmp_path, kind, make):
    root = tmp_path / "val" / kind.folder
    make(root)
    suffixes = (".json", ".jsonl", ".tsv", ".txt", ".parquet")
    files = [path for path in root.rglob("*") if path.suffix in suffixes]
    refused = 0
    for path in files:
        whole = path.read_bytes()
        for content in damaged(path):
            path.write_bytes(content)
            for options in (Options(), Options(True, True, False, False)):
                benchmark = make_benchmark(kind.name, tmp_path / "val", options)
                refused += not only_one_line(use, benchmark, tmp_path / "out")
        path.write_bytes(whole)
        assert only_one_line(use, make_benchmark(kind.name, tmp_path / "val"), tmp_path / "out")
    assert refused >= 6  # nothing of an empty or halved file is taken


@pytest.mark.parametrize("column", ["index", "question", "answer", "image", "category"])
@pytest.mark.parametrize("junk", [None, 7, 0.5, "", "x", [1], {"bytes": 1}])
def test_cells_of_a_parquet_file(tmp_path, column, junk):
    """Parquet files keep types: a question may be a number there, an index a text."""
    import pyarrow
    from pyarrow.parquet import write_table

    rows = [{**row, column: junk} for row in trees.mmstar_rows()]
    (tmp_path / "mmstar").mkdir()
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "mmstar/mmstar.parquet")
    taken = only_one_line(use, MmStar(tmp_path), tmp_path / "out")
    assert taken == (
        column == "category"
        or (column, junk) in (("index", 7), ("question", "x"), ("answer", "x"))
        or (column, junk) == ("image", "x")  # base64 or not is seen when the image is opened
    )


@pytest.mark.parametrize("name", ["gqa", "textvqa"])
def test_answer_files(tree, tmp_path, name):
    """Those that are scored, and those that a run goes on from."""
    benchmark = make_benchmark(name, tree)
    store = AnswerStore(tmp_path, benchmark, "model", {"max_new_tokens": 3})
    path = trees.lines(store.whole, [store.line(number, "A") for number in range(2)])
    whole = path.read_bytes()
    for content in list(damaged(path)):
        path.write_bytes(content)
        only_one_line(read_answers_for, benchmark, path)
        only_one_line(store.merge)
    path.write_bytes(whole)
    assert read_answers_for(benchmark, path) == store.merge() == ["A", "A"]


REVIEWS = {
    "llava-bench": {"category": "llava_bench_conv", "tuple": [8, 4]},
    "mm-vet": {"score": 0.5, "capability": ["ocr"], "truth": "x"},
}


@pytest.mark.parametrize("name", REVIEWS)
def test_review_files(tmp_path, name):
    benchmark = make_benchmark(name, tmp_path)
    good = REVIEWS[name]
    for place in places(good):
        for junk in JUNK if place else ():
            only_one_line(benchmark.score_reviews, [good, changed(good, place, junk)])
    assert benchmark.score_reviews([good]).value == 50
