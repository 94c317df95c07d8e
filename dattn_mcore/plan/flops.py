"""What a training step costs in floating-point operations, in closed form.

A multiply-add counts as two. Only products are counted: norms, activations, rotations and softmax
are small beside them. Symbols: hidden size h, MLP width f, H query heads, G key/value groups,
head size d. Forward, per layer:

    text row            q 2 h Hd   k, v 4 h Gd   output 2 h Hd   MLP 6 h f
    visual row, D-Attn             k, v 4 h Gd   output 2 h Gd   MLP 6 h f   (folded; else 2 h Hd)
    visual row, baseline as a text row
    visual row, last layer         k, v 4 h Gd   (nobody reads more of it)
    pair of query and key          4 H d

Backward costs a product's forward twice (gradients of inputs and of weights), and 8 H d a pair.
These are the model's operations, which MFU counts. Apart from them stand those that a step does
again: recompute, the scores that flash kernels find a second time, the loss' logits.
Source: the products follow from the layers; the counts are held against PyTorch's FLOP counter in
the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

from dattn_mcore.architectures import tower_features
from dattn_mcore.architectures.adapters import AdaptedLinear, adapted_linears
from dattn_mcore.architectures.decoder import OUTPUT
from dattn_mcore.config.lora import adapters_of
from dattn_mcore.config.schema import Config
from dattn_mcore.plan.backward import (
    DECODER,
    FC1,
    FC2,
    FIRST,
    PROJ,
    TOWER,
    Gradients,
    decoder_gradients,
    learning_outside,
    tower_gradients,
)
from dattn_mcore.plan.parameters import layers_of_stage
from dattn_mcore.plan.rows import Rows


@dataclass(frozen=True)
class Work:
    """Operations of one part of the model.

    Attributes:
        forward: operations of a forward pass.
        inputs: of the backward pass, for gradients of what entered (0 where nobody needs them).
        weights: of the backward pass, for gradients of weights (0 where they are frozen).
        again: of the backward pass, for what it computes although the model does not ask for it.
    """

    forward: float = 0
    inputs: float = 0
    weights: float = 0
    again: float = 0

    @property
    def total(self) -> float:
        """Operations of the model in a training step: without `again`."""
        return self.forward + self.inputs + self.weights

    @property
    def executed(self) -> float:
        """Operations that the device does in a training step."""
        return self.total + self.again

    def __add__(self, other: Work) -> Work:
        """Both."""
        return Work(*(getattr(self, name) + getattr(other, name) for name in self.__annotations__))

    def __mul__(self, factor: float) -> Work:
        """So many times this."""
        return Work(*(getattr(self, name) * factor for name in self.__annotations__))


def step_work(config: Config, rows: Rows) -> dict[str, Work]:
    """Operations of one training step by part: text, visual, attention, tower, projector, head.

    Text, visual and attention are the language model's layers. Costs do not depend on the layout,
    but for `train.recompute_layers`, which counts layers of a stage.

    Args:
        config: model, attention mode, what is trained, what is recomputed.
        rows: of the whole step, or of any share of it.
    """
    return {
        **decoder_work(config, rows),
        **_adapters(config, rows),
        "tower": _tower(config, rows),
        "projector": _projector(config, rows),
        "head": _head(config, rows),
    }


def _adapters(config: Config, rows: Rows) -> dict[str, Work]:
    """Of adapters, if there are any: A, B, and with DoRA their product with the weights' lengths.

    Both learn, and pass gradients on. What fused linears compute beside it is left out.
    """
    adapters = adapters_of(config)
    if adapters is None:
        return {}
    forward = again = 0.0
    recomputed, chunks = recomputed_layers(config), config.train.recompute_visual_chunk
    for linear in adapted_linears(config.model, adapters):
        for layer in linear.layers:
            work = sum(
                2 * adapters.rank * (inputs + outputs) * _adapted_rows(config, rows, linear, layer)
                for outputs, inputs in linear.shapes()
            )
            forward += work
            again += work * (layer in recomputed or chunks is not None)
            if adapters.dora:
                again += sum(2 * adapters.rank * m * n for m, n in linear.shapes()) * rows.packs
    return {"adapters": Work(forward, forward, forward, again)}


def _adapted_rows(config: Config, rows: Rows, linear: AdaptedLinear, layer: int) -> float:
    """Rows that go through an adapted linear."""
    if linear.place == "self_attention.linear_q":
        return rows.text + (rows.visual if _visual_asks(config, layer) else 0)
    if linear.place == "self_attention.linear_kv" or not visual_ends(config, layer):
        return rows.text + rows.visual
    return rows.text


def decoder_work(config: Config, rows: Rows) -> dict[str, Work]:
    """Of the language model's layers: text, visual and attention; see `step_work`."""
    llm, train = config.model.llm, config.train
    text = visual = attention = Work()
    chunks = train.recompute_visual_chunk is not None
    recomputed = recomputed_layers(config)
    for layer, gradients in enumerate(decoder_gradients(config)):
        last = layer == llm.num_layers - 1
        scores = 4 * llm.num_attention_heads * llm.head_dim * layer_pairs(config, rows, layer)
        full = layer in recomputed and gradients.any
        # A chunk of visual rows is computed twice, with full recompute three times, but for the
        # keys and values of the last layer.
        visual_again = 1 + (full and not last) if chunks and gradients.any else int(full)
        for linear, (per_text, per_visual) in layer_linears(config, layer).items():
            text += _product(gradients, linear, rows.text * per_text, int(full))
            visual += _product(gradients, linear, rows.visual * per_visual, visual_again)
        mlp_again = 0
        if train.recompute == "selective" and "mlp" in train.recompute_modules and gradients.any:
            mlp_again = 6 * llm.hidden_size * llm.ffn_hidden_size
        text += Work(again=rows.text * mlp_again)
        visual += Work(again=0 if visual_ends(config, layer) else rows.visual * mlp_again)
        core = train.recompute == "selective" and "core_attn" in train.recompute_modules
        attention += _attention(gradients, scores, full or core)
    return {"text": text, "visual": visual, "attention": attention}


def _product(gradients: Gradients, linear: str, forward: float, times_again: int = 0) -> Work:
    """Of a linear.

    Args:
        gradients: of its layer.
        linear: its name there.
        forward: operations of its forward pass.
        times_again: how often backward does the forward pass again.
    """
    inputs, computed = linear in gradients.inputs, linear in gradients.computed
    return Work(
        forward=forward,
        inputs=forward * inputs,
        weights=forward * (linear in gradients.weights),
        again=forward * (times_again + (computed and not inputs)),
    )


def _attention(gradients: Gradients, scores: float, recomputed: bool) -> Work:
    """Of the pairs of query and key; flash kernels do 10 H d a pair in backward instead of 8."""
    if not gradients.scores_computed:
        return Work(scores)
    work = Work(scores, 2 * scores, again=scores // 2 + recomputed * scores)
    return work if gradients.scores else Work(scores, again=work.again + work.inputs)


def recomputed_layers(config: Config) -> set[int]:
    """Layers that backward computes again as a whole."""
    if config.train.recompute != "full":
        return set()
    few, stages = config.train.recompute_layers, range(config.parallel.pp)
    chunks = [chunk for stage in stages for chunk in layers_of_stage(config, stage)]
    return {layer for chunk in chunks for layer in chunk[:few]}


def has_window(config: Config, layer: int) -> bool:
    """Whether layer 0, 1, ... has a sliding window."""
    return config.model.llm.window_of(layer) is not None


def folds(config: Config) -> bool:
    """Whether visual rows use the output projection summed over query heads of a group."""
    return config.attention.fold_visual_projection and config.attention.v2v == "diagonal"


def visual_ends(config: Config, layer: int) -> bool:
    """Whether visual rows end at this layer's keys and values."""
    chunks = config.train.recompute_visual_chunk is not None  # always end there
    ends = config.attention.skip_last_visual_rows or chunks
    return ends and layer == config.model.llm.num_layers - 1


def _visual_asks(config: Config, layer: int) -> bool:
    """Whether visual rows are queries (flash kernels know windows only where all rows ask)."""
    unread = visual_ends(config, layer) and not has_window(config, layer)
    return config.attention.v2v == "causal" and not unread


def layer_linears(config: Config, layer: int) -> dict[str, tuple[int, int]]:
    """Forward operations of each linear of a layer per text row and per visual row."""
    llm = config.model.llm
    per_head = llm.hidden_size * llm.head_dim
    query = output = 2 * per_head * llm.num_attention_heads
    keys_values = 4 * per_head * llm.num_query_groups
    mlp_in, mlp_out = (n * llm.hidden_size * llm.ffn_hidden_size for n in (4, 2))
    folded = 2 * per_head * llm.num_query_groups if folds(config) else output
    goes_on = not visual_ends(config, layer)
    first_linear, second_linear = FIRST[DECODER]
    return {
        first_linear: (query, query * _visual_asks(config, layer)),
        second_linear: (keys_values, keys_values),
        PROJ: (output, folded * goes_on),
        FC1: (mlp_in, mlp_in * goes_on),
        FC2: (mlp_out, mlp_out * goes_on),
    }


def layer_pairs(config: Config, rows: Rows, layer: int) -> float:
    """Pairs of query and key in layer 0, 1, ...; queries of visual rows included."""
    text, visual = rows.text_pairs, rows.visual_pairs
    if has_window(config, layer):
        text, visual = rows.windowed_text_pairs, rows.windowed_visual_pairs
    return text + (visual if _visual_asks(config, layer) else 0)


def _head(config: Config, rows: Rows) -> Work:
    """The output layer, for labelled rows; backward computes the logits again."""
    llm = config.model.llm
    product = 2 * llm.hidden_size * llm.padded_vocab_size * rows.labelled
    outside = learning_outside(config)
    weight, before = OUTPUT in outside.keys, outside.before_head
    return Work(product, product * before, product * weight, product * (before or weight))


def _tower(config: Config, rows: Rows) -> Work:
    """The vision tower; without gradients below what learns."""
    vision, features = config.model.vision, tower_features(config.model)
    v, p = vision.hidden_size, vision.rows_per_tile
    seen = p + features.class_row
    square, mlp = 2 * v * v * seen, 2 * v * vision.ffn_hidden_size * seen
    linears = {
        FIRST[TOWER][0]: 3 * square,
        PROJ: square,
        FC1: (features.mlp_products - 1) * mlp,
        FC2: mlp,
    }
    patches = 2 * 3 * vision.patch_size**2 * v * p
    # Nobody needs a gradient of pixels.
    learning = learning_outside(config).keys
    work = Work(patches, weights=patches * ("vision.patch_embedding.weight" in learning))
    for gradients in tower_gradients(config):
        for linear, forward in linears.items():
            work += _product(gradients, linear, forward)
        work += _attention(gradients, 4 * seen * seen * v, recomputed=False)
    return work * rows.tiles


def _projector(config: Config, rows: Rows) -> Work:
    vision, h = config.model.vision, config.model.llm.hidden_size
    width = config.model.projector.ffn_hidden_size
    first = 2 * vision.hidden_size * width * rows.tiles * vision.rows_per_tile
    second = 2 * width * h * rows.tiles * vision.rows_per_tile
    outside = learning_outside(config)
    features, learning = outside.features, outside.keys
    one, bias, two = (
        f"projector.mlp.{name}" in learning
        for name in ("linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight")
    )
    hidden = features or one or bias
    work = Work(
        forward=first + second,
        inputs=first * features + second * hidden,
        weights=first * one + second * two,
        # Megatron-Core's linears compute their input's gradient, of frozen features too.
        again=first * (one and not features) + second * (two and not hidden),
    )
    if config.model.visual_positions and rows.tiles:
        # Row and column positions, two linears each, once a pack; sinusoids need no gradient.
        axis = 2 * vision.grid_size * h * h * rows.packs
        for name in ("row_position", "column_position"):
            one, bias, two = (
                f"projector.{name}.{end}" in learning
                for end in ("fc1.weight", "fc1.bias", "fc2.weight")
            )
            work += Work(2 * axis, inputs=axis * (one or bias), weights=axis * (one + two))
    return work
