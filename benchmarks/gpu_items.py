"""What `gpu_check` runs: items, each a process of its own, in order of worth.

The minutes of a GPU's items are estimates for one H100 or H200, imports and compilation included:
none has run on a GPU yet. They decide whether an item starts in the time that is left, and when it
is stopped.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Literal

Kind = Literal["benchmark", "tests", "report"]
TESTS = ("none", "short", "all")


@dataclass(frozen=True)
class Item:
    """One process.

    Attributes:
        name: of its line in the summary and of its files; with the device, of its section on the
            page.
        kind: a benchmark has a section on the page and writes a picture and a JSON file; tests
            write JUnit XML; of a report only the output is kept.
        command: what stands after `python`; `arguments_of` adds what all of a kind get.
        minutes: expected.
    """

    name: str
    kind: Kind
    command: str
    minutes: float


# On one GPU of 80 to 141 GB: D-Attn, baseline and LLaVA stand side by side in the step.
_STEP = "-m benchmarks.training_step --text 512"
_PLANNED = "-m benchmarks.planned_step --text 512"
_MEMORY = "-m benchmarks.peak_memory --layers 16 --text 512 --chunk 2048"
# As many layers as fit, in bf16 and FP8, next to the planner's word.
_ALL = "--precision bf16 tensorwise blockwise delayed --visual 576 2304 4608 9216 18432 36864"
GPU_TESTS = Item("tests", "tests", "-m pytest -q -rs tests/gpu", minutes=30)
GPU = (
    Item(
        "attention-backends",
        "benchmark",
        "-m benchmarks.attention_backends --repeats 20",
        minutes=15,
    ),
    Item(
        "training-step-mistral",
        "benchmark",
        f"{_STEP} --layers 4 --visual 576 2880 8064 16128 32256 --size mistral",
        minutes=4,
    ),
    Item(
        "training-step-gemma",
        "benchmark",
        f"{_STEP} --layers 4 --visual 576 2880 8064 --size gemma",
        minutes=3,
    ),
    Item("planned-step-mistral", "benchmark", f"{_PLANNED} {_ALL} --size mistral", minutes=8),
    Item("planned-step-gemma", "benchmark", f"{_PLANNED} {_ALL} --size gemma", minutes=8),
    Item("peak-memory-mistral", "benchmark", f"{_MEMORY} --size mistral", minutes=4),
    Item("peak-memory-gemma", "benchmark", f"{_MEMORY} --size gemma", minutes=4),
)
# Kernels first: without them no number is worth anything. Then what the paper claims (time, memory
# and how both grow with visual rows), for one model before the other.
_NATIVE = "tests/gpu/test_triton_native.py"
SHORT_TESTS = (
    Item(
        "kernels",
        "tests",
        f"-m pytest -q -rs {_NATIVE}"
        " -k 'equals_reference and (bf16-packed and None-None or bf16-few-text and 1.5-None)'",
        minutes=1.5,
    ),
    Item(
        "training-equals-the-cpu",
        "tests",
        "-m pytest -q -rs tests/gpu/test_gpu.py -k 'training_equals_the_cpu and not anyres'",
        minutes=1,
    ),
    Item(
        "transformer-engine",
        "tests",
        "-m pytest -q -rs tests/gpu/test_gpu_transformer_engine.py"
        " -k 'same_losses or recipe_trains and tensorwise'",
        minutes=1,
    ),
)
# Visual and text rows of the short list's attention; `warm_kernels` compiles for the same.
SHORT_VISUAL, SHORT_TEXT = (576, 8192), (512,)
_SHORT_SIZES = (
    f"--visual {' '.join(map(str, SHORT_VISUAL))} --text {' '.join(map(str, SHORT_TEXT))}"
)
_SHORT_MEMORY = "-m benchmarks.peak_memory --layers 4 --text 512 --chunk 2048 --visual 2048 8192"
SHORT = (
    Item(
        "attention-backends",
        "benchmark",
        f"-m benchmarks.attention_backends --repeats 10 --peers causal {_SHORT_SIZES}",
        minutes=1.5,
    ),
    Item(
        "training-step-mistral",
        "benchmark",
        f"{_STEP} --layers 2 --visual 576 2880 8064 --size mistral",
        minutes=1,
    ),
    Item(
        "planned-step-mistral",
        "benchmark",
        f"{_PLANNED} --precision bf16 --visual 2304 9216 --size mistral",
        minutes=1.5,
    ),
    Item("peak-memory-mistral", "benchmark", f"{_SHORT_MEMORY} --size mistral", minutes=1),
    Item(
        "training-step-gemma",
        "benchmark",
        f"{_STEP} --layers 2 --visual 576 2880 8064 --size gemma",
        minutes=1,
    ),
    Item(
        "planned-step-gemma",
        "benchmark",
        f"{_PLANNED} --precision bf16 --visual 2304 9216 --size gemma",
        minutes=1.5,
    ),
    Item("peak-memory-gemma", "benchmark", f"{_SHORT_MEMORY} --size gemma", minutes=1),
)
DOCTOR = Item("doctor", "report", "-m dattn_mcore.doctor", minutes=0.5)
CPU = (
    Item("attention-backends", "benchmark", "-m benchmarks.attention_backends", minutes=10),
    Item(
        "training-step-small",
        "benchmark",
        "-m benchmarks.training_step --visual 576 1152 2304 4608",
        minutes=20,
    ),
    Item("flops", "benchmark", "-m benchmarks.count_flops", minutes=20),
    Item("peak-memory-tiny", "benchmark", "-m benchmarks.peak_memory", minutes=20),
)


def items_for(device: str, tests: str, short: bool) -> list[Item]:
    """The list, in order of worth.

    Args:
        device: cpu or gpu; on a CPU the benchmarks are few, and there are no tests.
        tests: one of TESTS.
        short: whether benchmarks are the short list's.
    """
    if device == "cpu":
        return list(CPU)
    chosen = {"none": [], "short": list(SHORT_TESTS), "all": [GPU_TESTS]}[tests]
    return [DOCTOR, *chosen, *(SHORT if short else GPU)]


def arguments_of(item: Item, device: str, folder: str) -> list[str]:
    """Python's arguments.

    Args:
        item: what runs.
        device: cpu or gpu.
        folder: where it leaves its files.
    """
    arguments = ["-W", "ignore", *shlex.split(item.command)]
    if item.kind == "benchmark":
        arguments += ["--device", device, "--out", f"{folder}/performance"]
    if item.kind == "tests":
        arguments += ["-p", "no:cacheprovider", f"--junitxml={folder}/{item.name}.xml"]
    return arguments
