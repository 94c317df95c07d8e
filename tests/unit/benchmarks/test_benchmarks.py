"""The benchmarks' own instruments, and that each runs: sizes here are as small as can be."""

import argparse
import importlib
import itertools
import json
import shlex

import pytest
import torch

from benchmarks import attention_backends, planned_step, shared_images
from benchmarks.gpu_check import write_on_page
from benchmarks.gpu_items import GPU, SHORT
from benchmarks.measure import peak_bytes, seconds_in_turn
from benchmarks.results import hand_over, markdown_table, write_section
from benchmarks.run_items import Result

CPU = torch.device("cpu")
# Of what the command leaves to a default.
FEW = {
    **{
        name: ["--repeats", "1"] for name in ("benchmarks.training_step", "benchmarks.planned_step")
    },
    "benchmarks.peak_memory": ["--visual", "1024"],
}


def test_peak_counts_what_lives_at_the_same_time():
    def one_after_the_other():
        for _ in range(3):
            torch.ones(1000, dtype=torch.float64)

    def together():
        return [torch.ones(1000, dtype=torch.float64) for _ in range(3)]

    assert peak_bytes(one_after_the_other, CPU) == pytest.approx(8000, abs=200)
    assert peak_bytes(together, CPU) == pytest.approx(24000, abs=500)


def test_functions_take_turns():
    calls = []
    times = seconds_in_turn({name: lambda n=name: calls.append(n) for name in "ab"}, 2, CPU)
    assert calls == list("ababab") and set(times) == {"a", "b"}


def test_a_section_of_the_page_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- begin x -->\nold\n<!-- end x -->\nbelow\n")
    write_section(page, "x", "new\n")
    assert page.read_text() == "above\n<!-- begin x -->\nnew\n<!-- end x -->\nbelow\n"
    with pytest.raises(ValueError, match="no section y"):
        write_section(page, "y", "new\n")


def test_what_is_handed_over(tmp_path, capsys):
    args = argparse.Namespace(device="cpu", out=tmp_path / "out")
    table = markdown_table(("a", "b"), [(1, 2)])
    hand_over("name", args, table, [{"a": 1}], lambda axes: axes.plot([1, 2]))
    assert table in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "name-cpu.json").read_text())["rows"] == [{"a": 1}]
    assert (tmp_path / "out" / "name-cpu.png").stat().st_size > 1000


SMALLER = {
    **{"--visual": ["576"], "--text": ["32"], "--layers": ["2"], "--chunk": ["128"]},
    **{"--size": ["tiny"], "--precision": ["fp32"], "--repeats": ["1"]},
}


def scaled_down(command):
    """Module and arguments of a GPU's benchmark, its sizes replaced by small ones."""
    module, *rest = shlex.split(command)[1:]
    arguments, values = [], SMALLER
    while rest:
        flag, rest = rest[0], rest[1:]
        own = list(itertools.takewhile(lambda word: not word.startswith("--"), rest))
        rest = rest[len(own) :]
        arguments += [flag, *values.get(flag, own)]
    return module, arguments


BENCHMARKS = {
    **{item.name: item for item in GPU},
    **{f"short-{item.name}": item for item in SHORT},
}


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if "attention" not in name])
def test_what_a_gpu_measures_runs_and_reaches_the_page(name, tmp_path, capsys):
    """Every flag and every column, on a small model; only sizes, device and precision differ."""
    item = BENCHMARKS[name]
    module, arguments = scaled_down(item.command)
    assert "tiny" in arguments
    folder = tmp_path / "results"
    status = importlib.import_module(module).main(
        [*arguments, "--device", "cpu", "--out", str(folder / "performance"), *FEW.get(module, [])]
    )
    outcome = "failed" if status else "passed"
    result = Result(item.name, outcome, output=capsys.readouterr().out)
    page = tmp_path / "page.md"
    page.write_text(f"<!-- begin {item.name}-gpu -->\nNot yet.\n<!-- end {item.name}-gpu -->\n")
    write_on_page(item, result, "gpu", page, folder)
    text = page.read_text()
    assert "Not yet" not in text and "failed" not in text
    assert len([line for line in text.splitlines() if line.startswith("|")]) >= 3


def test_fp8_without_transformer_engine_is_said_in_the_table(tmp_path, capsys):
    arguments = ["--size", "tiny", "--precision", "tensorwise", "--layers", "4", "--visual", "576"]
    assert planned_step.main([*arguments, "--text", "32", "--out", str(tmp_path)]) == 1
    line = capsys.readouterr().out.splitlines()[2]
    assert line.startswith("| tensorwise | not measured: ") and "Transformer Engine" in line


def test_layers_are_as_many_as_the_planner_says_fit():
    """A GPU of 80 GB holds some of Mistral's 32 layers, and fewer with more visual rows."""
    args = argparse.Namespace(size="mistral", device="gpu", text=512, visual=[576])
    few = argparse.Namespace(**{**vars(args), "visual": [36864]})
    gpu = planned_step.GPUS["h100"]
    most = planned_step.most_layers(args, "bf16", gpu)
    assert 2 < planned_step.most_layers(few, "bf16", gpu) < most < 32
    config = planned_step.config_for(args, "bf16", most + 1)
    assert not planned_step.plan_for(config, gpu, 512, 576).fits


def test_questions_about_one_image_are_measured(tmp_path, capsys):
    """Counted operations are those of the closed form: rows that are shared, computed once."""
    arguments = ["--size", "tiny", "--layers", "2", "--questions", "3", "--repeats", "1"]
    shared_images.main([*arguments, "--text", "40", "24", "--out", str(tmp_path)])
    table = capsys.readouterr().out.splitlines()
    assert table[2].startswith("| 3 x 40 | ") and table[3].startswith("| 3 x 24 | ")
    rows = json.loads((tmp_path / "shared-images-tiny-cpu.json").read_text())["rows"]
    for row in rows:
        assert min(row["seconds"].values()) > 0
        for name, counted in row["counted"].items():
            assert counted == pytest.approx(row["closed_form"][name], rel=0.01)
        assert 1.5 < shared_images.ratio(row["counted"]) < 3


def test_attention_is_measured_against_both_peers(tmp_path):
    """At one small size; flex_attention is not compiled here, which needs a C++ compiler."""
    arguments = ["--visual", "64", "--text", "32", "--repeats", "1", "--out", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: function)
        assert attention_backends.main(arguments) == 0
    rows = json.loads((tmp_path / "attention-backends-cpu.json").read_text())["rows"]
    backends = {(row["layer"], row["direction"]): row["backend"] for row in rows}
    both = ("forward", "forward and backward")
    assert backends == {
        (layer, way): name
        for layer, name in (("mistral", "sdpa"), ("gemma2", "reference"))
        for way in both
    }
    for row in rows:
        assert row["seconds"] > 0 and row["causal"] > 0
        assert (row["flex"] is None) == (row["direction"] != "forward")
