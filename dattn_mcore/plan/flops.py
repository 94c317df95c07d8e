"""Floating point operations of a step, in closed form: text, visual, attention, tower, head.

Counted are matrix multiplications, two operations for a multiply-add, as PyTorch's FLOP counter
does; tests hold both equal on a small model. "Model FLOPs" leave recompute out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dattn_mcore.config.schema import Config

Layout = tuple[tuple[bool, int], ...]  # ((is_visual, rows), ...) of one sample, in reading order


@dataclass(frozen=True)
class Rows:
    """What goes through the model.

    Attributes:
        text: text rows.
        visual: visual rows.
        tiles: images in the tower.
        labelled: text rows whose logits are computed.
        text_pairs: (query, key) pairs of text queries; over windows where a layer has one.
        windowed_text_pairs: the same in the layers with a sliding window.
        visual_pairs: (query, key) pairs of visual queries: none with V2V diagonal.
        windowed_visual_pairs: the same in the layers with a sliding window.
        packs: micro-batches.
    """

    text: float
    visual: float
    tiles: float
    labelled: float
    text_pairs: float
    windowed_text_pairs: float
    visual_pairs: float = 0.0
    windowed_visual_pairs: float = 0.0
    packs: float = 1.0

    def __add__(self, other: Rows) -> Rows:
        """Rows of both."""
        return Rows(*(getattr(self, name) + getattr(other, name) for name in self.__annotations__))

    def __mul__(self, factor: float) -> Rows:
        """Rows of so many times this."""
        return Rows(*(getattr(self, name) * factor for name in self.__annotations__))


def causal_pairs(rows: float, window: int | None = None) -> float:
    """Pairs of a causal self-attention over a run of rows, each row itself included."""
    if window is None or rows <= window:
        return rows * (rows + 1) / 2
    return window * (window + 1) / 2 + (rows - window) * window


def rows_of(config: Config, layouts: Iterable[Layout], labelled: float) -> Rows:
    """Counts the rows and pairs of one pack.

    Args:
        config: model and attention mode.
        layouts: runs of each sample.
        labelled: text rows with a label.
    """
    per_tile = config.model.vision.rows_per_tile
    total = Rows(0, 0, 0, labelled, 0, 0)
    for layout in layouts:
        total += _sample(config, layout, per_tile)
    return total


def _sample(config: Config, layout: Layout, per_tile: int) -> Rows:
    attention, window = config.attention, config.model.llm.sliding_window
    text = sum(rows for is_visual, rows in layout if not is_visual)
    visual = sum(rows for is_visual, rows in layout if is_visual)
    before = seen = 0
    for is_visual, rows in layout:
        if is_visual:
            seen += rows
        else:
            before += rows * seen
    full, windowed = causal_pairs(text), causal_pairs(text, window)
    cross, windowed_cross = float(before), float(before)
    visual_pairs = windowed_visual = 0.0
    everything = causal_pairs(text + visual)
    if attention.t2v_position == "rope":
        # One axis for all rows: the window cuts text and visual keys alike.
        share = causal_pairs(text + visual, window) / everything if everything else 1.0
        windowed, windowed_cross = full * share, cross * share
    if attention.v2v == "causal":
        visual_pairs = windowed_visual = causal_pairs(visual)
        if attention.t2v_position == "rope":
            visual_pairs = everything - full - cross
            windowed_visual = visual_pairs * share
    return Rows(
        text=text,
        visual=visual,
        tiles=visual / per_tile,
        labelled=0,
        text_pairs=full + cross,
        windowed_text_pairs=windowed + windowed_cross,
        visual_pairs=visual_pairs,
        windowed_visual_pairs=windowed_visual,
        packs=0,
    )


@dataclass(frozen=True)
class Work:
    """Operations of one part of the model.

    Attributes:
        forward: operations of a forward pass.
        inputs: of the backward pass, for gradients of what entered (0 where nobody needs them).
        weights: of the backward pass, for gradients of weights (0 where they are frozen).
    """

    forward: float = 0.0
    inputs: float = 0.0
    weights: float = 0.0

    @property
    def total(self) -> float:
        """Operations of a training step, without recompute."""
        return self.forward + self.inputs + self.weights

    def __add__(self, other: Work) -> Work:
        """Both."""
        return Work(
            self.forward + other.forward, self.inputs + other.inputs, self.weights + other.weights
        )

    def __mul__(self, factor: float) -> Work:
        """So many times this."""
        return Work(self.forward * factor, self.inputs * factor, self.weights * factor)


def windowed_layers(config: Config) -> int:
    """Layers with a sliding window."""
    llm = config.model.llm
    if llm.sliding_window is None:
        return 0
    return len(range(0, llm.num_layers, llm.sliding_window_every))


def layer_gemms(config: Config) -> tuple[float, float]:
    """Forward operations of a layer's linears per text row and per visual row."""
    llm, h = config.model.llm, config.model.llm.hidden_size
    query = 2 * h * llm.num_attention_heads * llm.head_dim
    keys_values = 2 * h * 2 * llm.num_query_groups * llm.head_dim
    mlp = 2 * 3 * h * llm.ffn_hidden_size
    text = query + keys_values + query + mlp
    if config.attention.v2v == "causal":
        return text, text
    projection = query
    if folds(config):
        projection = 2 * h * llm.num_query_groups * llm.head_dim
    return text, keys_values + projection + mlp


def folds(config: Config) -> bool:
    """Whether visual rows use the output projection summed over query heads of a group."""
    return config.attention.fold_visual_projection and config.attention.v2v == "diagonal"


def step_work(config: Config, rows: Rows) -> dict[str, Work]:
    """Operations of one training step by part: text, visual, attention, tower, projector, head.

    Args:
        config: model, attention mode and what is trained.
        rows: of the whole step, or of any share of it.
    """
    llm, trains = config.model.llm, config.train.trains
    below = "projector" in trains or "vision" in trains  # gradients must pass the language model
    learns = "llm" in trains

    def gemm(forward: float) -> Work:
        return Work(forward, forward, forward if learns else 0.0)

    per_text, per_visual = layer_gemms(config)
    text = rows.text * per_text * llm.num_layers
    visual = rows.visual * per_visual * llm.num_layers
    full_layers = llm.num_layers - windowed_layers(config)
    pairs = full_layers * (rows.text_pairs + rows.visual_pairs)
    pairs += windowed_layers(config) * (rows.windowed_text_pairs + rows.windowed_visual_pairs)
    if config.attention.skip_last_visual_rows:  # keys and values are all that is left
        keys_values = 2 * llm.hidden_size * 2 * llm.num_query_groups * llm.head_dim
        visual -= rows.visual * (per_visual - keys_values)
        windowed = windowed_layers(config) and not ((llm.num_layers - 1) % llm.sliding_window_every)
        pairs -= rows.windowed_visual_pairs if windowed else rows.visual_pairs
    attention = 4 * llm.num_attention_heads * llm.head_dim * pairs
    head = 2 * llm.hidden_size * llm.padded_vocab_size * rows.labelled
    backward = learns or below
    return {
        "text": gemm(text) if backward else Work(text),
        "visual": gemm(visual) if backward else Work(visual),
        "attention": Work(attention, 2 * attention if backward else 0.0),
        "tower": _tower(config, rows),
        "projector": _projector(config, rows),
        "head": Work(head, head if backward else 0.0, head if learns else 0.0),
    }


def _tower(config: Config, rows: Rows) -> Work:
    vision = config.model.vision
    v, p = vision.hidden_size, vision.rows_per_tile
    seen = p + (vision.kind == "clip")
    conv = 2 * 3 * vision.patch_size**2 * v * p
    layers = vision.num_layers + 1 + vision.select_layer
    linears = layers * 2 * (4 * v * v + 2 * v * vision.ffn_hidden_size) * seen
    attention = layers * 4 * seen * seen * v
    if "vision" not in config.train.trains:
        return Work(conv + linears + attention) * rows.tiles
    return Work(conv + linears + attention, linears + 2 * attention, conv + linears) * rows.tiles


def _projector(config: Config, rows: Rows) -> Work:
    vision, trains, h = config.model.vision, config.train.trains, config.model.llm.hidden_size
    width = config.model.projector.ffn_hidden_size
    first = 2 * vision.hidden_size * width * rows.tiles * vision.rows_per_tile
    second = 2 * width * h * rows.tiles * vision.rows_per_tile
    axes = 0.0
    if config.model.visual_positions and rows.tiles:
        axes = 2 * 2 * 2 * vision.grid_size * h * h * rows.packs
    work = Work(first + second + axes)
    if "projector" in trains:
        # The sinusoids need no gradient, so of each axis' two linears only the second passes one.
        work += Work(0.0, second + axes / 2, first + second + axes)
    elif "vision" in trains:
        work += Work(0.0, second)
    if "vision" in trains:
        work += Work(0.0, first)
    return work
