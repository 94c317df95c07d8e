"""The twelve benchmarks of the D-Attn release, by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from dattn_mcore.errors import ConfigError
from dattn_mcore.evaluation.benchmarks.base import Benchmark, Options, Row
from dattn_mcore.evaluation.benchmarks.gqa import Gqa
from dattn_mcore.evaluation.benchmarks.llava_bench import LlavaBench
from dattn_mcore.evaluation.benchmarks.mmbench import MmBench
from dattn_mcore.evaluation.benchmarks.mme import Mme
from dattn_mcore.evaluation.benchmarks.mmstar import MmStar
from dattn_mcore.evaluation.benchmarks.mmvet import MmVet
from dattn_mcore.evaluation.benchmarks.pope import Pope
from dattn_mcore.evaluation.benchmarks.scienceqa import ScienceQa
from dattn_mcore.evaluation.benchmarks.seed_bench import SeedBench
from dattn_mcore.evaluation.benchmarks.textvqa import TextVqa
from dattn_mcore.evaluation.benchmarks.vizwiz import VizWiz
from dattn_mcore.evaluation.benchmarks.vqav2 import Vqav2

# In the order of the release's list.
ALL: tuple[type[Benchmark], ...] = (
    ScienceQa,
    Mme,
    Gqa,
    Pope,
    TextVqa,
    SeedBench,
    LlavaBench,
    MmVet,
    Vqav2,
    MmBench,
    VizWiz,
    MmStar,
)
BY_NAME = {benchmark.name: benchmark for benchmark in ALL}


def make_benchmark(name: str, data: str | Path, options: Options | None = None) -> Benchmark:
    """A benchmark by its name on the command line.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in BY_NAME:
        near = difflib.get_close_matches(name, BY_NAME, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"--benchmarks has {name!r}; known are {', '.join(BY_NAME)}{hint}")
    return BY_NAME[name](data, options)


__all__ = ["ALL", "BY_NAME", "Benchmark", "Options", "Row", "make_benchmark"]
