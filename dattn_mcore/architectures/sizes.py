"""What a model is, without a run: sizes of its parts, and how its attention is decomposed.

The defaults are the embedded task's (reading handwritten digits). What all models of a family have
in common is no setting: it stands in the family's record.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dattn_mcore.types import V2V, Merge, T2VPosition

LayerKind = Literal["sliding", "full"]
TowerActivation = Literal["gelu_tanh", "gelu", "quick_gelu", "silu"]
RopeKind = Literal["default", "linear", "llama3", "yarn"]
TimeAxis = Literal["clip", "seconds"]
AttentionBackend = Literal["auto", "reference", "sdpa", "flash", "triton"]


@dataclass(frozen=True)
class RopeConfig:
    """How rotary positions are stretched for sequences longer than those first trained on."""

    kind: RopeKind = "default"  # default: not at all
    factor: float = 1.0  # by which low frequencies are divided (linear: all)
    original_length: int = 8192  # llama3, yarn: positions of the model before it was stretched
    low_frequency_factor: float = 1.0  # llama3: original_length over this wave length: divided
    high_frequency_factor: float = 4.0  # llama3: original_length over this one: as they were
    beta_slow: float = 1.0  # yarn: waves of fewer turns in original_length are divided
    beta_fast: float = 32.0  # yarn: waves of more turns stay as they were
    truncate: bool = True  # yarn: both borders are moved outwards to whole frequencies
    attention_factor: float = 1.0  # yarn: on rotated queries and on rotated keys
    query_scale_beta: float = 0.0  # yarn: a query at p times 1 + beta ln(1 + p // original_length)


# Of layers without rotary positions. No setting: a setting's values are those of its annotation.
NOT_ROTATED = RopeConfig(kind="none")  # type: ignore[arg-type]


@dataclass(frozen=True)
class LlmConfig:
    """The language model's sizes; what `model.family` says of all its models is not among them."""

    num_layers: int = 4  # decoder layers
    hidden_size: int = 128  # width of the residual stream
    ffn_hidden_size: int = 352  # of the gated MLP
    num_attention_heads: int = 4  # query heads; a multiple of parallel.tp
    num_query_groups: int = 4  # key/value heads; a multiple of parallel.tp, or it of them
    head_dim: int = 32  # of queries, keys and values; need not be hidden_size / heads
    vocab_size: int = 384  # rows that carry meaning; padded up to a multiple of vocab_pad_multiple
    vocab_pad_multiple: int = 128  # independent of tp, so that a checkpoint fits every layout
    norm_eps: float = 1e-5  # of the RMS norms
    rotary_base: float = 10000.0  # RoPE theta
    sliding_rotary_base: float | None = None  # of sliding layers, not stretched; null: as others
    rope: RopeConfig = field(default_factory=RopeConfig)
    rotary_pattern: tuple[bool, ...] = ()  # has a layer rotary positions; repeated; []: all have
    attention_softcap: float | None = None  # Gemma 2: 50.0
    final_softcap: float | None = None  # Gemma 2: 30.0
    query_scale: float | None = None  # softmax scale is query_scale ** -0.5; None: head_dim
    sliding_window: int | None = None  # keys visible to a query, itself included
    layer_pattern: tuple[LayerKind, ...] = ()  # of windows, repeated over the layers; []: all alike
    tie_embeddings: bool = False  # the output layer is the embedding (Gemma)
    init_std: float = 0.12  # for a hidden size of 128; 0.02 suits 4096

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding; independent of the layout."""
        return -(-self.vocab_size // self.vocab_pad_multiple) * self.vocab_pad_multiple

    def groups_per_rank(self, tp_size: int) -> int:
        """Key/value heads on a tensor parallel rank; ranks share one where they are more."""
        return max(1, self.num_query_groups // tp_size)

    def window_of(self, layer: int) -> int | None:
        """Sliding window of layer 0, 1, ...; None: it sees all keys before it."""
        pattern = self.layer_pattern
        kind = pattern[layer % len(pattern)] if pattern else "sliding"
        return self.sliding_window if kind == "sliding" else None

    def rope_of(self, layer: int) -> tuple[float, RopeConfig]:
        """Rotary base of layer 0, 1, ..., and how its frequencies are stretched."""
        pattern = self.rotary_pattern
        if pattern and not pattern[layer % len(pattern)]:
            return self.rotary_base, NOT_ROTATED
        if self.sliding_rotary_base is not None and self.window_of(layer) is not None:
            return self.sliding_rotary_base, RopeConfig()
        return self.rotary_base, self.rope

    @property
    def ropes(self) -> tuple[tuple[float, RopeConfig], ...]:
        """The different ones of `rope_of`, in the order in which layers first have them."""
        return tuple(dict.fromkeys(self.rope_of(layer) for layer in range(self.num_layers)))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer."""
        return tuple(self.window_of(layer) for layer in range(self.num_layers))


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower's sizes."""

    kind: str = "siglip"  # of tower
    image_size: int = 56  # side of a tile in pixels
    patch_size: int = 28  # the digits task: one patch per digit
    num_layers: int = 4  # encoder layers
    hidden_size: int = 128  # width of its features
    ffn_hidden_size: int = 256  # of its MLP
    num_attention_heads: int = 4  # a multiple of parallel.tp
    norm_eps: float = 1e-6  # of its norms
    activation: TowerActivation = "gelu_tanh"  # siglip: gelu_tanh; clip: quick_gelu; aimv2: silu
    select_layer: int = -1  # -1: all layers and the final norm; -2: without the last layer, no norm
    init_std: float = 0.09  # for a hidden size of 128; published weights replace it

    @property
    def grid_size(self) -> int:
        """Patches along one side of a tile (a rest of pixels is not used: 384 / 14 is 27)."""
        return self.image_size // self.patch_size

    @property
    def rows_per_tile(self) -> int:
        """Visual rows of one tile."""
        return self.grid_size**2

    @property
    def layers_run(self) -> int:
        """Encoder layers that are run; those behind the selected one do not exist in the model."""
        return self.num_layers + self.select_layer + 1


@dataclass(frozen=True)
class ProjectorConfig:
    """Two-layer MLP from tower features to LLM rows, row and column positions, final norm."""

    ffn_hidden_size: int = 128  # between its two linears
    output_norm_init: float = 1.0  # start of the final norm's weight (Gemma 2: 0.028976)
    norm_eps: float = 1e-6  # of the final norm


@dataclass(frozen=True)
class VideoConfig:
    """How the frames of a video become visual rows; each frame is a tile."""

    enabled: bool = False  # true: the model has positions in time; no data source gives videos yet
    frame_grid: int = 0  # rows and columns of a frame, to which features are shrunk; 0: all patches
    time_axis: TimeAxis = "clip"  # clip: from a video's start to its end; seconds: as they are
    time_positions: bool = True  # false: frames are seen, but not when
    time_entries: int = 10000  # clip: positions that a video is stretched over (Vidi: 10000)


@dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    family: str = "mistral"  # of the language model
    visual_positions: bool = True  # False removes the tower's and the projector's positions
    llm: LlmConfig = field(default_factory=LlmConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    video: VideoConfig = field(default_factory=VideoConfig)

    @property
    def frame_side(self) -> int:
        """Rows, and columns, of a frame whose grid is not shrunk further."""
        return self.video.frame_grid or self.vision.grid_size

    @property
    def time_positions(self) -> bool:
        """Whether the projector adds positions in time."""
        return self.visual_positions and self.video.enabled and self.video.time_positions


@dataclass(frozen=True)
class AttentionConfig:
    """How the causal self-attention over `[visual; text]` is decomposed (arXiv 2502.01906)."""

    v2v: V2V = "diagonal"  # causal: the baseline
    t2v_position: T2VPosition = "none"  # none: debiased; rope: the baseline
    merge: Merge = "alpha"  # alpha: exact weighting; sum: weight 1 for each part
    backend: AttentionBackend = "auto"  # auto: the fastest that can compute the model
    fold_visual_projection: bool = True  # visual rows' output projection summed over query heads
    skip_last_visual_rows: bool = True  # the last layer keeps only keys and values of visual rows
