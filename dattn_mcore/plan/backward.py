"""Which gradients a step computes in each layer: those that learning needs, and further ones.

A tensor that learns needs the gradients of all that comes after it, and of nothing before. Beyond
that Megatron-Core computes the gradient of what enters a linear whose weight learns, and passes
gradients on to the first layer of a pipeline stage, and to that of the first stage where layers are
computed again.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from dattn_mcore.architectures.decoder import OUTPUT
from dattn_mcore.architectures.parameters import part_of
from dattn_mcore.config.optim_groups import learns, resolved
from dattn_mcore.config.schema import Config
from dattn_mcore.plan.parameters import layers_of_stage

TOWER, DECODER = "vision.decoder.layers.", "decoder.layers."
PROJ, FC1, FC2 = "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"
FIRST = {
    TOWER: ("self_attention.linear_qkv",),
    DECODER: ("self_attention.linear_q", "self_attention.linear_kv"),
}


@dataclass(frozen=True)
class Gradients:
    """Of one layer; linears are named without `.weight`.

    Attributes:
        inputs: linears whose input needs a gradient.
        computed: linears whose input gets one.
        weights: linears whose weight learns.
        scores: queries, keys or values need a gradient.
        scores_computed: they get one.
        entered: backward goes on to what entered the layer.
    """

    inputs: frozenset[str]
    computed: frozenset[str]
    weights: frozenset[str]
    scores: bool
    scores_computed: bool
    entered: bool

    @property
    def any(self) -> bool:
        """Backward computes something here, and so needs what forward left behind."""
        return self.scores_computed or bool(self.computed or self.weights) or self.entered


@functools.lru_cache(maxsize=32)
def tower_gradients(config: Config) -> tuple[Gradients, ...]:
    """Of each of the tower's layers."""
    learning = _learning(config)
    needed = any(part_of(key) == "vision" and "final" not in key for key in learning[None])
    layers = []
    for layer in range(config.model.vision.layers_run):
        gradients, needed = _of_layer(learning[layer], TOWER, needed, needed)
        layers.append(gradients)
    return tuple(layers)


@functools.lru_cache(maxsize=32)
def decoder_gradients(config: Config) -> tuple[Gradients, ...]:
    """Of each of the language model's layers."""
    learning, train = _learning(config), config.train
    needed = any(
        part_of(key) != "llm" or key.startswith("embedding.")
        for keys in learning.values()
        for key in keys
    )
    again = train.recompute != "none" or train.recompute_visual_chunk is not None
    starts = _chunks(config)
    layers, computed = [], needed
    for layer in range(config.model.llm.num_layers):
        if layer in starts and layer > 0:
            computed = True  # what another stage sends
        elif layer in starts and again:
            computed = computed or _chunk_learns(config, learning, starts[layer])
        gradients, needed_after = _of_layer(learning[layer], DECODER, needed, computed)
        computed = computed or needed_after
        needed = needed_after
        layers.append(gradients)
    return tuple(layers)


@dataclass(frozen=True)
class Outside:
    """What learns outside of the layers.

    Attributes:
        keys: tensors that stand in no layer and learn; a tied output layer's among them.
        features: anything of the tower learns.
        before_head: anything but the output layer learns.
    """

    keys: frozenset[str]
    features: bool
    before_head: bool


@functools.lru_cache(maxsize=32)
def learning_outside(config: Config) -> Outside:
    """What learns outside of the layers."""
    learning = [tensor for tensor, settings in resolved(config).items() if settings.trains]
    keys = {key for key, layer in learning if layer is None}
    if learns(config, OUTPUT, None):
        keys.add(OUTPUT)
    return Outside(
        keys=frozenset(keys),
        features=any(part_of(key) == "vision" for key, _ in learning),
        before_head=any(key != OUTPUT for key, _ in learning),
    )


def learns_before_layers(config: Config) -> bool:
    """Whether the projector or the tower learns: what leaves the projector needs a gradient."""
    outside = learning_outside(config)
    return outside.features or any(part_of(key) == "projector" for key in outside.keys)


def _chunks(config: Config) -> dict[int, list[int]]:
    """Layers of each model chunk, by the first of them."""
    chunks = [c for stage in range(config.parallel.pp) for c in layers_of_stage(config, stage)]
    return {chunk[0]: chunk for chunk in chunks if chunk}


def _learning(config: Config) -> defaultdict[int | None, set[str]]:
    """Keys of what learns in each layer, of both stacks; of what stands in none under None."""
    learning: defaultdict[int | None, set[str]] = defaultdict(set)
    for (key, layer), settings in resolved(config).items():
        if settings.trains:
            learning[layer].add(key)
    return learning


def _chunk_learns(
    config: Config, learning: Mapping[int | None, set[str]], chunk: list[int]
) -> bool:
    """Whether anything of the first model chunk learns; it may be the whole model."""
    if len(chunk) == config.model.llm.num_layers:
        return any(learning.values())
    return any(learning.get(layer) for layer in chunk)


def _of_layer(keys: set[str], stack: str, needed: bool, computed: bool) -> tuple[Gradients, bool]:
    """Gradients of a layer.

    Args:
        keys: of what learns in layers of its number.
        stack: where keys of its own stack begin.
        needed: something before the layer learns.
        computed: autograd believes so.

    Returns:
        And whether what leaves the layer needs a gradient.
    """
    learning = {key.removeprefix(stack) for key in keys if key.startswith(stack)}
    inputs, scores, leaves = _flow(learning, FIRST[stack], needed)
    flowing, scores_computed, _ = _flow(learning, FIRST[stack], computed)
    weights = {name for name in (*FIRST[stack], PROJ, FC1, FC2) if f"{name}.weight" in learning}
    gradients = Gradients(
        inputs=frozenset(inputs),
        computed=frozenset(flowing | weights),
        weights=frozenset(weights),
        scores=scores,
        scores_computed=scores_computed,
        entered=computed,
    )
    return gradients, leaves


def _flow(learning: set[str], first: tuple[str, ...], entered: bool) -> tuple[set[str], bool, bool]:
    """Follows gradients through a layer.

    Args:
        learning: its tensors that learn.
        first: its linears before the attention.
        entered: what enters it has a gradient.

    Returns:
        Linears whose input has a gradient; whether queries, keys or values have; whether what
        leaves the layer has.
    """

    def learns(*beginnings: str) -> bool:
        return any(name.startswith(beginnings) for name in learning)

    inputs: set[str] = set()
    normed = entered or learns("input_layernorm")
    inputs |= set(first) if normed else set()
    scores = normed or learns(*first, "self_attention.q_layernorm", "self_attention.k_layernorm")
    inputs |= {PROJ} if scores else set()
    attended = entered or scores or learns(PROJ)
    normed = attended or learns("pre_mlp_layernorm")
    inputs |= {FC1} if normed else set()
    active = normed or learns(FC1)
    inputs |= {FC2} if active else set()
    return inputs, scores, active or learns(FC2)
