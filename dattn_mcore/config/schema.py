"""Every setting of a run, as frozen dataclasses, one per section of the YAML file.

The defaults are the embedded task (reading handwritten digits), so that
`torchrun pretrain_dattn.py` works with no file at all. Real models live in `configs/`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

ANYRES_GRIDS = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (1, 4), (4, 1))


@dataclass(frozen=True)
class LlmConfig:
    """The language model (Mistral- or Gemma-2-like)."""

    num_layers: int = 4  # decoder layers
    hidden_size: int = 128  # width of the residual stream
    ffn_hidden_size: int = 352  # of the gated MLP
    num_attention_heads: int = 4  # query heads; a multiple of parallel.tp
    num_query_groups: int = 4  # key/value heads; a multiple of parallel.tp
    head_dim: int = 32  # of queries, keys and values; need not be hidden_size / heads
    vocab_size: int = 384  # rows that carry meaning; padded up to a multiple of vocab_pad_multiple
    vocab_pad_multiple: int = 128  # independent of tp, so that a checkpoint fits every layout
    norm_eps: float = 1e-5  # of the RMS norms
    rotary_base: float = 10000.0  # RoPE theta
    activation: str = "silu"  # silu (SwiGLU) | gelu_tanh (GeGLU)
    zero_centered_gamma: bool = False  # Gemma: norms scale by 1 + weight
    post_norms: bool = False  # Gemma 2: norm each branch again before the residual
    attention_softcap: float | None = None  # Gemma 2: 50.0
    final_softcap: float | None = None  # Gemma 2: 30.0
    query_scale: float | None = None  # softmax scale is query_scale ** -0.5; None: head_dim
    sliding_window: int | None = None  # keys visible to a query, itself included
    sliding_window_every: int = 1  # windowed layers: 0, n, 2n, ... (Gemma 2: 2)
    scale_embeddings: bool = False  # Gemma: embeddings times sqrt(hidden_size)
    tie_embeddings: bool = False  # the output layer is the embedding (Gemma)
    init_std: float = 0.12  # for a hidden size of 128; 0.02 suits 4096

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding; independent of the layout."""
        return -(-self.vocab_size // self.vocab_pad_multiple) * self.vocab_pad_multiple


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower (SigLIP- or CLIP-like)."""

    kind: str = "siglip"  # siglip | clip
    image_size: int = 56  # side of a tile in pixels
    patch_size: int = 28  # the digits task: one patch per digit
    num_layers: int = 4  # encoder layers
    hidden_size: int = 128  # width of its features
    ffn_hidden_size: int = 256  # of its MLP
    num_attention_heads: int = 4  # a multiple of parallel.tp
    norm_eps: float = 1e-6  # of its layer norms
    activation: str = "gelu_tanh"  # siglip: gelu_tanh; clip: quick_gelu
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


@dataclass(frozen=True)
class ProjectorConfig:
    """Two-layer MLP from tower features to LLM rows, row and column positions, final norm."""

    ffn_hidden_size: int = 128  # between its two linears
    output_norm_init: float = 1.0  # start of the final norm's weight (Gemma 2: 0.028976)
    norm_eps: float = 1e-6  # of the final norm


@dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    family: str = "mistral"  # mistral | gemma2: which Hugging Face text model it exports to
    transformer_impl: str = "auto"  # auto | local | transformer_engine: linears and norms
    visual_positions: bool = True  # False removes the tower's and the projector's positions
    llm: LlmConfig = field(default_factory=LlmConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)


@dataclass(frozen=True)
class AttentionConfig:
    """How the causal self-attention over `[visual; text]` is decomposed (arXiv 2502.01906)."""

    v2v: str = "diagonal"  # diagonal (D-Attn) | causal (baseline)
    t2v_position: str = "none"  # none (debiased) | rope (baseline)
    merge: str = "alpha"  # alpha (exact weighting) | sum (weight 1 for each part)
    backend: str = "auto"  # auto | reference | sdpa | flash | triton
    fold_visual_projection: bool = True  # visual rows' output projection summed over query heads
    skip_last_visual_rows: bool = True  # the last layer keeps only keys and values of visual rows


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is split over processes. Data parallel size is what is left."""

    tp: int = 1  # tensor parallel
    pp: int = 1  # pipeline parallel
    vpp: int = 1  # model chunks per pipeline stage (interleaved schedule when > 1)
    first_stage_layers: int | None = None  # of the tower's stage; null: as many as others
    cp: int = 1  # context parallel; only 1 is implemented
    sp: bool = False  # sequence parallel norms and residuals, over the tp group
    overlap_grad_reduce: bool = False  # reduce gradients while backward goes on
    overlap_param_gather: bool = False  # gather updated weights while forward goes on
    tp_comm_overlap: bool = False  # tensor parallel exchanges beside products (needs sp, TE)
    timeout_minutes: float = 10.0  # a collective that waits longer ends the run


@dataclass(frozen=True)
class SourceConfig:
    """One source of samples; `data.sources` lists them where there are several."""

    annotations: str = ""  # file, or a pattern like shards/*.tar: LLaVA JSON, tar, parquet
    image_folder: str = ""  # folder that image paths start in; unused where images lie in the file
    weight: float = 1.0  # how often each sample is seen in an epoch; 0.5: every other one, in turn
    format: str = "auto"  # auto (by the file's name) | json | tar | parquet


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how samples become packed micro-batches."""

    annotations: str = "data/digits/pretrain.json"  # LLaVA JSON
    image_folder: str = "data/digits/images"  # folder that image paths start in
    sources: tuple[SourceConfig, ...] = ()  # several, mixed, instead of the two settings above
    index_dir: str | None = None  # where indexes are kept; null: .index beside the annotations
    build_index: bool = True  # false: a run needs `python -m dattn_mcore.data index` before it
    metadata_keys: tuple[str, ...] = ()  # of samples, to leave aside beside the known ones
    max_bad_share: float = 0.01  # of samples that may be unusable; 0: the first ends the run
    template: str = "plain"  # plain | mistral | gemma
    tokenizer: str = "data/digits/tokenizer.model"  # SentencePiece file or Hugging Face folder
    prepare: str = "digits"  # digits: make the embedded data set if it is absent | none
    text_budget: int = 512  # text rows of one packed micro-batch
    visual_budget: int = 512  # visual rows of one packed micro-batch
    step_packs_multiple: int | None = None  # a step is a multiple of it of full packs; null: off
    fixed_rows: bool = False  # pad every micro-batch to both budgets: one shape for all
    over_budget: str = "skip"  # skip | truncate | error: a sample that fits no micro-batch
    max_skipped_share: float = 0.1  # of usable samples that may be skipped as over budget
    pad_multiple: int = 8  # rows are padded to a multiple of this (and of what tp and FP8 need)
    image_backend: str = "auto"  # auto | dali | pillow
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # per channel, in 0..1
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)  # per channel, in 0..1
    image_policy: str = "stretch"  # one square tile, or a base view and a canvas of tiles (AnyRes)
    anyres_grids: tuple[tuple[int, int], ...] = ANYRES_GRIDS  # canvases in tiles: [columns, rows]
    anyres_ties: str = "aspect"  # aspect | first: which of equal canvases anyres_stretch takes
    apply_orientation: bool = True  # EXIF: images as people see them; false: ignored, as LLaVA does
    transparency: str = "white"  # white (laid over it) | drop (the colours under it, as LLaVA does)
    max_image_pixels: int = 100_000_000  # larger images are refused before they are decoded
    decode_threads: int = 2  # of each process that loads images
    prefetch: int = 2  # global batches prepared ahead of the step

    @property
    def max_tiles(self) -> int:
        """Most tiles of one image."""
        if not self.image_policy.startswith("anyres_"):
            return 1
        return 1 + max(columns * rows for columns, rows in self.anyres_grids)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with cosine decay after a linear warm-up."""

    lr: float = 2e-3  # peak learning rate
    lr_projector: float | None = None  # None: lr
    lr_vision: float | None = None  # None: lr
    min_lr_ratio: float = 0.0  # learning rate after the last step, relative to its peak
    warmup_ratio: float = 0.05  # share of the steps; of w such steps, step i has lr x i / w
    weight_decay: float = 0.0  # decoupled; not on norms and biases
    beta1: float = 0.9  # decay of Adam's mean of gradients
    beta2: float = 0.95  # decay of Adam's mean of squared gradients
    eps: float = 1e-8  # added to Adam's denominator
    clip_grad: float = 1.0  # largest norm of all gradients together; 0: no limit


@dataclass(frozen=True)
class TrainConfig:
    """What is trained in this stage, and for how long."""

    stage: str = "pretrain"  # align | pretrain | instruct: names the run
    trains: tuple[str, ...] = ("vision", "projector", "llm")  # the other parts are frozen
    global_batch_size: int = 64  # samples per optimizer step (about: data.step_packs_multiple)
    steps: int | None = 300  # optimizer steps; null: from epochs
    epochs: float = 1.0  # used where steps is null
    precision: str = "fp32"  # fp32 | bf16
    fp8: str = "none"  # none | delayed | tensorwise | blockwise: recipe of the decoder's linears
    fp8_bf16_layers: int | None = None  # at each end, in bf16; null: 1, with delayed 0
    recompute: str = "none"  # none | selective | full
    recompute_modules: tuple[str, ...] = ("core_attn",)  # selective: core_attn, layernorm, mlp
    recompute_layers: int | None = None  # full: the first so many of each stage; null: all
    recompute_visual_chunk: int | None = None  # visual rows recomputed at a time; null: all kept
    loss_chunk: int = 1024  # supervised rows whose logits are in memory at once
    seed: int = 1234  # of initial weights and of the order of samples
    deterministic: bool = False  # the same bits each time; slower on a GPU, refuses some kernels
    device: str = "auto"  # auto | cpu | gpu


@dataclass(frozen=True)
class CheckpointConfig:
    """Where weights come from and go to."""

    init_from: str | None = None  # run folder or checkpoint whose weights start this run
    save_interval: int = 200  # steps; the last step is always saved
    asynchronous: bool = False  # write while training goes on; a stage's last save is awaited
    keep: int = 2  # newest whole checkpoints that stay on disk
    resume: bool = True  # go on from the newest whole checkpoint of the run folder
    keep_optimizer_settings: bool = False  # on a resume: optim and schedule of the checkpoint


@dataclass(frozen=True)
class HealthConfig:
    """How long a rank may stand still before the run ends by itself."""

    start_timeout_seconds: float = 120.0  # from the first rank's start to the last one's
    step_timeout_seconds: float = 480.0  # a step, and the wait for its data; 0: no limit
    checkpoint_timeout_seconds: float = 1800.0  # to load or to save one; 0: no limit


@dataclass(frozen=True)
class LogConfig:
    """What is reported, and where."""

    run_dir: str = "runs/digits_pretrain"  # metrics, checkpoints, reports, settings
    interval: int = 10  # steps between lines
    tensorboard: bool = True  # write run_dir/tensorboard
    communication_share: bool = False  # measured by a profiler in the last step of an interval


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    log: LogConfig = field(default_factory=LogConfig)
