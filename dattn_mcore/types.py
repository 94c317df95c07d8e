"""Words that a setting may have, where several rooms of the package know them."""

from __future__ import annotations

from typing import Literal

V2V = Literal["diagonal", "causal"]
T2VPosition = Literal["none", "rope"]
Merge = Literal["alpha", "sum"]
Implementation = Literal["local", "transformer_engine"]
Fp8Recipe = Literal["delayed", "tensorwise", "blockwise"]
RecomputeGranularity = Literal["none", "selective", "full"]
RecomputeModule = Literal["core_attn", "layernorm", "mlp"]
Part = Literal["vision", "projector", "llm"]  # of a model
