"""What several parts of the package share and none of them owns."""

from __future__ import annotations

from typing import Literal

# (is_visual, rows) of each run of a sample, in reading order.
Layout = tuple[tuple[bool, int], ...]

NO_IMAGES = -1  # in the place of a unit's number: a sample of text alone

# The label of a text row that has no loss, as in PyTorch's cross entropy and transformers.
IGNORED_LABEL = -100

# Stands for an image in annotations and questions, as LLaVA's files have it.
IMAGE_MARK = "<image>"

# Words that a setting may have.
V2V = Literal["diagonal", "causal"]
T2VPosition = Literal["none", "rope"]
Merge = Literal["alpha", "sum"]
Implementation = Literal["local", "transformer_engine"]
Fp8Recipe = Literal["delayed", "tensorwise", "blockwise"]
RecomputeGranularity = Literal["none", "selective", "full"]
RecomputeModule = Literal["core_attn", "layernorm", "mlp"]
Part = Literal["vision", "projector", "llm"]  # of a model

# The benchmarks of the evaluation, by their names on the command line.
BenchmarkName = Literal[
    "scienceqa",
    "mme",
    "gqa",
    "pope",
    "textvqa",
    "seed",
    "llava-bench",
    "mm-vet",
    "vqav2",
    "mmbench",
    "vizwiz",
    "mmstar",
]
