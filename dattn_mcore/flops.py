"""What a training step costs in floating-point operations, in closed form.

A multiply-add counts as two. Only products are counted: norms, activations, rotations and softmax
are small beside them. Symbols: hidden size h, MLP width f, H query heads, G key/value groups,
head size d. Forward, per layer:

    text row            q 2 h Hd   k, v 4 h Gd   output 2 h Hd   MLP 6 h f
    visual row, D-Attn             k, v 4 h Gd   output 2 h Gd   MLP 6 h f   (folded; else 2 h Hd)
    visual row, baseline as a text row
    visual row, last layer         k, v 4 h Gd   (nobody reads more of it)
    pair of query and key          4 H d

Backward costs twice the forward products (gradients of inputs and of weights), and 10 H d a pair:
flash kernels compute the scores again. What is recomputed costs its forward once more.
Source: the products follow from the layers; the counts are held against PyTorch's FLOP counter in
the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dattn_mcore.config.schema import Config

Layout = tuple[tuple[bool, int], ...]  # as layers.layout has it: ((is_visual, rows), ...)


@dataclass(frozen=True)
class Pack:
    """Rows of a micro-batch, by what they are and what they see.

    Attributes:
        layouts: runs of each sample in reading order.
        supervised: text rows with a label.
    """

    layouts: tuple[Layout, ...]
    supervised: int

    @property
    def visual(self) -> int:
        """Visual rows."""
        return sum(rows for layout in self.layouts for is_visual, rows in layout if is_visual)

    @property
    def text(self) -> int:
        """Text rows."""
        return sum(rows for layout in self.layouts for is_visual, rows in layout if not is_visual)

    def pairs(self, kind: str, window: int | None = None) -> int:
        """Pairs of query and key.

        Args:
            kind: t2t, t2v (all of a sample's visual rows before a text row), v2v (causal), or
                all (causal over rows in reading order).
            window: keys a query sees at most, itself included; not for t2v.
        """
        if kind == "t2v":
            return sum(_text_to_visual(layout) for layout in self.layouts)
        chosen = {"t2t": (False,), "v2v": (True,), "all": (True, False)}[kind]
        lengths = (
            sum(rows for is_visual, rows in layout if is_visual in chosen)
            for layout in self.layouts
        )
        return sum(_causal(length, window) for length in lengths)


def _text_to_visual(layout: Layout) -> int:
    pairs = visual = 0
    for is_visual, rows in layout:
        if is_visual:
            visual += rows
        else:
            pairs += rows * visual
    return pairs


def _causal(rows: int, window: int | None) -> int:
    seen = min(rows, window or rows)
    return seen * (seen + 1) // 2 + (rows - seen) * seen


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one part of a step.

    Attributes:
        forward: of the forward pass.
        backward: of the backward pass.
        recompute: what backward computes a second time.
    """

    forward: int
    backward: int
    recompute: int = 0

    @property
    def total(self) -> int:
        """Of the whole step."""
        return self.forward + self.backward + self.recompute

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.forward + other.forward,
            self.backward + other.backward,
            self.recompute + other.recompute,
        )


def step_flops(config: Config, packs: Sequence[Pack]) -> dict[str, Flops]:
    """Costs of a training step, by part: vision, projector, decoder, head.

    Args:
        config: sizes, mode, what trains, recomputation. Costs do not depend on the layout.
        packs: micro-batches of the step, over all data parallel replicas.
    """
    none = Flops(0, 0)
    return {
        "vision": sum((vision_flops(config, pack) for pack in packs), none),
        "projector": sum((projector_flops(config, pack) for pack in packs), none),
        "decoder": sum((decoder_flops(config, pack) for pack in packs), none),
        "head": sum((head_flops(config, pack) for pack in packs), none),
    }


def decoder_flops(config: Config, pack: Pack) -> Flops:
    """All layers of the language model."""
    llm = config.model.llm
    learns = "llm" in config.train.trains
    products = attention = visual_products = again = 0
    for layer in range(llm.num_layers):
        text, visual = layer_products(config, pack, last=layer == llm.num_layers - 1)
        products += text + visual
        visual_products += visual
        attention += 4 * llm.num_attention_heads * llm.head_dim * layer_pairs(config, pack, layer)
    chunks = config.train.recompute_visual_chunk is not None
    if config.train.recompute == "full":
        # With chunks visual rows are computed twice more: the chunk, then layer by layer.
        again = products + attention + (visual_products - visual if chunks else 0)
    else:
        again += attention if config.train.recompute == "selective" else 0
        again += visual_products if chunks else 0
    return Flops(
        forward=products + attention,
        backward=products * (2 if learns else 1) + attention * 5 // 2,
        recompute=again,
    )


def layer_products(config: Config, pack: Pack, last: bool = False) -> tuple[int, int]:
    """Forward products of one layer's linears, of text and of visual rows."""
    llm, attention = config.model.llm, config.attention
    per_head = llm.hidden_size * llm.head_dim
    query = output = 2 * per_head * llm.num_attention_heads
    key_value = 4 * per_head * llm.num_query_groups
    mlp = 6 * llm.hidden_size * llm.ffn_hidden_size
    text = pack.text * (query + key_value + output + mlp)
    chunks = config.train.recompute_visual_chunk is not None  # always end there
    ends = last and (attention.skip_last_visual_rows or chunks)
    if attention.v2v == "causal":
        asks = not ends or llm.sliding_window is not None
        row = (query if asks else 0) + key_value + (0 if ends else output + mlp)
    else:
        if attention.fold_visual_projection:
            output = 2 * per_head * llm.num_query_groups
        row = key_value + (0 if ends else output + mlp)
    return text, pack.visual * row


def layer_pairs(config: Config, pack: Pack, layer: int) -> int:
    """Pairs of query and key in layer 0, 1, ...; queries of visual rows included."""
    llm, attention = config.model.llm, config.attention
    window = llm.sliding_window if layer % llm.sliding_window_every == 0 else None
    one_axis = attention.t2v_position == "rope"
    last = layer == llm.num_layers - 1
    visual_asks = attention.v2v == "causal" and not (
        last and attention.skip_last_visual_rows and window is None
    )
    if visual_asks and one_axis:
        return pack.pairs("all", window)
    pairs = pack.pairs("t2t", window) + pack.pairs("t2v")
    return pairs + (pack.pairs("v2v", window) if visual_asks else 0)


def head_flops(config: Config, pack: Pack) -> Flops:
    """The output layer, for supervised rows; backward computes the logits again."""
    llm = config.model.llm
    product = 2 * pack.supervised * llm.hidden_size * llm.padded_vocab_size
    learns = "llm" in config.train.trains
    return Flops(product, product * (2 if learns else 1), product)


def vision_flops(config: Config, pack: Pack) -> Flops:
    """The vision tower; without gradients where it is frozen."""
    vision = config.model.vision
    tiles = pack.visual // vision.rows_per_tile
    rows = vision.rows_per_tile + (vision.kind == "clip")
    h = vision.hidden_size
    per_row = 8 * h * h + 4 * h * vision.ffn_hidden_size + 4 * h * rows
    layers = vision.num_layers + 1 + vision.select_layer
    patches = vision.rows_per_tile * 2 * 3 * vision.patch_size**2 * h
    forward = tiles * (rows * per_row * layers + patches)
    attention = tiles * rows * rows * 4 * h * layers
    if "vision" not in config.train.trains:
        return Flops(forward, 0)
    # The first layer that learns needs no gradient of pixels.
    return Flops(forward, 2 * forward + attention // 2 - tiles * patches)


def projector_flops(config: Config, pack: Pack) -> Flops:
    """The projector's two linears (its positions are computed once a grid, not a row)."""
    vision, projector = config.model.vision, config.model.projector
    first = 2 * pack.visual * vision.hidden_size * projector.ffn_hidden_size
    second = 2 * pack.visual * projector.ffn_hidden_size * config.model.llm.hidden_size
    trains = config.train.trains
    weights = first + second if "projector" in trains else 0
    # Megatron-Core's linears always compute their input's gradient, of frozen features too.
    inputs = first + second if {"projector", "vision"} & set(trains) else 0
    return Flops(first + second, weights + inputs)
