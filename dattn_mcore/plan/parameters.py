"""Every parameter that one rank of a pipeline stage holds, in Megatron-Core's order.

The order matters: Megatron-Core lays gradients and optimizer states out in it. Tests hold names,
shapes, dtypes and order equal to those of the model that Megatron-Core builds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dattn_mcore.config.schema import Config, LlmConfig

BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Parameter:
    """A parameter of one rank.

    Attributes:
        name: as Megatron-Core's module has it.
        shape: on one tensor parallel rank.
        dtype: bf16 or fp32.
        trained: whether it has a gradient.
        shared_embedding: tied weight of which two stages hold a copy.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    trained: bool
    shared_embedding: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def part(self) -> str:
        """vision, projector or llm."""
        first = self.name.partition(".")[0]
        return first if first in ("vision", "projector") else "llm"


def layers_of_stage(config: Config, stage: int) -> list[list[int]]:
    """Numbers (from 0) of the language model's layers in each model chunk of a stage."""
    parallel, layers = config.parallel, config.model.llm.num_layers
    first = parallel.first_stage_layers
    if first is not None:
        rest = (layers - first) // (parallel.pp - 1)
        start = 0 if stage == 0 else first + (stage - 1) * rest
        return [list(range(start, start + (first if stage == 0 else rest)))]
    chunk = layers // (parallel.pp * parallel.vpp)
    starts = [(index * parallel.pp + stage) * chunk for index in range(parallel.vpp)]
    return [list(range(start, start + chunk)) for start in starts]


def stage_parameters(config: Config, stage: int) -> list[list[Parameter]]:
    """Parameters of one rank of a stage, one list per model chunk.

    Args:
        config: a checked configuration.
        stage: pipeline stage, from 0.
    """
    parallel = config.parallel
    chunks = []
    for index, layers in enumerate(layers_of_stage(config, stage)):
        first = stage == 0 and index == 0
        last = stage == parallel.pp - 1 and index == parallel.vpp - 1
        chunks.append(list(_chunk(config, len(layers), first, last)))
    return chunks


def _chunk(config: Config, num_layers: int, first: bool, last: bool) -> Iterator[Parameter]:
    dtype = "bf16" if config.train.precision == "bf16" else "fp32"
    trains, llm, tp = config.train.trains, config.model.llm, config.parallel.tp
    apart = llm.tie_embeddings and config.parallel.pp > 1
    vocabulary = (llm.padded_vocab_size // tp, llm.hidden_size)

    def parameter(name: str, *shape: int, kind: str = dtype, shared: bool = False) -> Parameter:
        part = name.partition(".")[0]
        part = part if part in ("vision", "projector") else "llm"
        return Parameter(name, shape, kind, part in trains, shared)

    if first:
        for name, shape in _vision(config):
            yield parameter(f"vision.{name}", *shape)
        for name, shape in _projector(config):
            axis = "_position." in name
            yield parameter(f"projector.{name}", *shape, kind="fp32" if axis else dtype)
        yield parameter("embedding.word_embeddings.weight", *vocabulary, shared=apart)
    for layer in range(num_layers):
        for name, shape in _layer(llm, tp):
            yield parameter(f"decoder.layers.{layer}.{name}", *shape)
    if last:
        yield parameter("decoder.final_layernorm.weight", llm.hidden_size)
        if apart or not llm.tie_embeddings:
            yield parameter("output_layer.weight", *vocabulary, shared=apart)


Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _layer(llm: LlmConfig, tp: int) -> Shapes:
    h = llm.hidden_size
    query = llm.num_attention_heads * llm.head_dim // tp
    keys_values = 2 * llm.num_query_groups * llm.head_dim // tp
    yield "input_layernorm.weight", (h,)
    yield "self_attention.linear_q.weight", (query, h)
    yield "self_attention.linear_kv.weight", (keys_values, h)
    yield "self_attention.linear_proj.weight", (h, query)
    if llm.post_norms:
        yield "self_attention.linear_proj.post_norm.weight", (h,)
    yield "pre_mlp_layernorm.weight", (h,)
    yield "mlp.linear_fc1.weight", (2 * llm.ffn_hidden_size // tp, h)
    yield "mlp.linear_fc2.weight", (h, llm.ffn_hidden_size // tp)
    if llm.post_norms:
        yield "mlp.linear_fc2.post_norm.weight", (h,)


def _vision(config: Config) -> Shapes:
    vision, tp = config.model.vision, config.parallel.tp
    v, clip = vision.hidden_size, vision.kind == "clip"
    if clip:
        yield "class_embedding", (v,)
    yield "patch_embedding.weight", (v, 3, vision.patch_size, vision.patch_size)
    if not clip:
        yield "patch_embedding.bias", (v,)
    if config.model.visual_positions:
        yield "position_embedding.weight", (vision.rows_per_tile + clip, v)
    if clip:
        yield "pre_layernorm.weight", (v,)
        yield "pre_layernorm.bias", (v,)
    for layer in range(vision.num_layers + 1 + vision.select_layer):
        for name, shape in _vision_layer(v, vision.ffn_hidden_size, tp):
            yield f"decoder.layers.{layer}.{name}", shape
    if not clip and vision.select_layer == -1:
        yield "decoder.final_layernorm.weight", (v,)
        yield "decoder.final_layernorm.bias", (v,)


def _vision_layer(v: int, ffn: int, tp: int) -> Shapes:
    yield "input_layernorm.weight", (v,)
    yield "input_layernorm.bias", (v,)
    yield "self_attention.linear_proj.weight", (v, v // tp)
    yield "self_attention.linear_proj.bias", (v,)
    yield "self_attention.linear_qkv.weight", (3 * v // tp, v)
    yield "self_attention.linear_qkv.bias", (3 * v // tp,)
    yield "pre_mlp_layernorm.weight", (v,)
    yield "pre_mlp_layernorm.bias", (v,)
    yield "mlp.linear_fc1.weight", (ffn // tp, v)
    yield "mlp.linear_fc1.bias", (ffn // tp,)
    yield "mlp.linear_fc2.weight", (v, ffn // tp)
    yield "mlp.linear_fc2.bias", (v,)


def _projector(config: Config) -> Shapes:
    h, tp = config.model.llm.hidden_size, config.parallel.tp
    width, v = config.model.projector.ffn_hidden_size, config.model.vision.hidden_size
    yield "mlp.linear_fc1.weight", (width // tp, v)
    yield "mlp.linear_fc1.bias", (width // tp,)
    yield "mlp.linear_fc2.weight", (h, width // tp)
    yield "mlp.linear_fc2.bias", (h,)
    yield "norm.weight", (h,)
    if config.model.visual_positions:
        for axis in ("row", "column"):
            for layer in ("fc1", "fc2"):
                yield f"{axis}_position.{layer}.weight", (h, h)
                yield f"{axis}_position.{layer}.bias", (h,)
    yield "output_norm.weight", (h,)
