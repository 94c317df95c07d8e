"""Every setting of a run, as frozen dataclasses, one per section of the YAML file.

The defaults are the embedded task (reading handwritten digits), so that
`torchrun pretrain_dattn.py` works with no file at all. Real models live in `configs/`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dattn_mcore.architectures.sizes import (
    AttentionConfig,
    LlmConfig,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
)
from dattn_mcore.types import (
    BenchmarkName,
    Fp8Recipe,
    Implementation,
    Part,
    RecomputeGranularity,
    RecomputeModule,
    TowerWork,
)

__all__ = [
    "ANYRES_GRIDS",
    "AttentionConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "HealthConfig",
    "LlmConfig",
    "LoraConfig",
    "LogConfig",
    "MappingConfig",
    "ModelConfig",
    "OptimConfig",
    "OptimGroup",
    "ParallelConfig",
    "ProfileConfig",
    "ProjectorConfig",
    "ScoresConfig",
    "SourceConfig",
    "TrainConfig",
    "ValidationConfig",
    "VisionConfig",
]
ImagePolicy = Literal["stretch", "pad", "crop", "anyres_stretch", "anyres_letterbox"]
Schedule = Literal["cosine", "linear", "constant", "inverse_square_root", "wsd"]
WsdDecay = Literal["exponential", "linear", "cosine", "minus_sqrt"]
SourceFormat = Literal[
    "auto",
    "json",
    "tar",
    "parquet",
    "arrow",
    "llava",
    "sharegpt",
    "messages",
    "swift",
    "llama_factory",
    "cauldron",
    "interleaved",
    "pixmo",
    "energon",
    "webdataset",
]
LossOn = Literal["all", "last"]
ANYRES_GRIDS = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (1, 4), (4, 1))


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is split over processes. Data parallel size is what is left."""

    tp: int = 1  # tensor parallel
    pp: int = 1  # pipeline parallel
    vpp: int = 1  # model chunks per pipeline stage (interleaved schedule when > 1)
    first_stage_layers: int | None = None  # of the tower's stage; null: as many as others
    cp: int = 1  # context parallel: ranks that divide a pack's rows
    sp: bool = False  # sequence parallel norms and residuals, over the tp group
    tower: TowerWork = "tensor"  # of tp ranks: each has part of the tower; tiles: all of it
    overlap_grad_reduce: bool = False  # reduce gradients while backward goes on
    overlap_param_gather: bool = False  # gather updated weights while forward goes on
    tp_comm_overlap: bool = False  # tensor parallel exchanges beside products (needs sp, TE)
    timeout_minutes: float = 10.0  # a collective that waits longer ends the run


@dataclass(frozen=True)
class MappingConfig:
    """Where the fields of a record stand: keys with dots between, `[]` behind a list."""

    id: str = ""  # empty: the key id, else the record's place
    images: str = ""  # paths or bytes
    turns: str = ""  # list of turns, with role and text; or else question and answer
    role: str = ""  # who speaks, in each turn
    text: str = ""  # what is said, in each turn
    user: str = "user"  # role of who asks
    assistant: str = "assistant"  # role of who answers
    question: str = ""  # of a record with one question
    answer: str = ""  # of a record with one question
    system: str = ""  # text of a system turn
    weight: str = ""  # what the sample's loss counts


@dataclass(frozen=True)
class SourceConfig:
    """One source of samples; `data.sources` lists them where there are several."""

    annotations: str = ""  # file, or a pattern like shards/*.tar: JSON, tar, parquet, Arrow
    image_folder: str = ""  # folder that image paths start in; empty: that of the file
    weight: float = 1.0  # how often each sample is seen in an epoch; 0.5: every other one, in turn
    format: SourceFormat = "auto"  # file or form of records; auto: name and first records say it
    mapping: MappingConfig = MappingConfig()  # of records of no known form


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how samples become packed micro-batches."""

    annotations: str = "data/digits/pretrain.json"  # file or pattern: JSON, tar, parquet, Arrow
    image_folder: str = "data/digits/images"  # folder that image paths start in
    sources: tuple[SourceConfig, ...] = ()  # several, mixed, instead of the two settings above
    index_dir: str | None = None  # where indexes are kept; null: .index beside the annotations
    build_index: bool = True  # false: a run needs `python -m dattn_mcore.data index` before it
    metadata_keys: tuple[str, ...] = ()  # of samples, to leave aside beside the known ones
    max_bad_share: float = 0.01  # of samples that may be unusable; 0: the first ends the run
    template: str = "plain"  # plain, or a chat template of model.family
    loss_on: LossOn = "all"  # answers that are learned; last: of a conversation the last one
    tokenizer: str = "data/digits/tokenizer.model"  # SentencePiece file or Hugging Face folder
    prepare: Literal["none", "digits"] = "digits"  # digits: make that data set if it is absent
    text_budget: int = 512  # text rows of one packed micro-batch
    visual_budget: int = 512  # visual rows of one packed micro-batch
    step_packs_multiple: int | None = None  # a step is a multiple of it of full packs; null: off
    fixed_rows: bool = False  # pad every micro-batch to both budgets: one shape for all
    over_budget: Literal["skip", "truncate", "error"] = "skip"  # a sample that fits no micro-batch
    max_skipped_share: float = 0.1  # of usable samples that may be skipped as over budget
    pad_multiple: int = 8  # rows are padded to a multiple of this (and of what tp and FP8 need)
    share_images: bool = True  # samples that show the same images compute their rows once
    hash_images: bool = False  # images of the same bytes are the same; the index reads each whole
    group_images: bool = False  # samples of the same images in one step, so that they share rows
    image_backend: Literal["auto", "dali", "pillow"] = "auto"  # auto: DALI where it is installed
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # per channel, in 0..1
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)  # per channel, in 0..1
    image_policy: ImagePolicy = "stretch"  # one square tile, or AnyRes: a base view and a canvas
    anyres_grids: tuple[tuple[int, int], ...] = ANYRES_GRIDS  # canvases in tiles: [columns, rows]
    anyres_ties: Literal["aspect", "first"] = "aspect"  # anyres_stretch: which of equal canvases
    apply_orientation: bool = True  # EXIF: images as people see them; false: ignored, as LLaVA does
    transparency: Literal["white", "drop"] = "white"  # on white; drop: colours below, as LLaVA
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
class OptimGroup:
    """Settings of the parameters that patterns name; they win, later groups over earlier ones."""

    patterns: tuple[str, ...] = ()  # of names; `*`, `?`, `{a,b}`, `{13..25}`: docs/training.md
    trains: bool | None = None  # true: they learn; false: frozen; null: as train.trains says
    lr: float | None = None  # peak learning rate; null: as without this group
    weight_decay: float | None = None  # not on norms and biases; null: as without this group
    beta1: float | None = None  # null: as without this group
    beta2: float | None = None  # null: as without this group


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, and its learning rate after a linear warm-up."""

    lr: float = 2e-3  # peak learning rate
    lr_projector: float | None = None  # None: lr
    lr_vision: float | None = None  # None: lr
    vision_layer_decay: float | None = None  # the tower's rate x this ^ (layers above); null: 1
    groups: tuple[OptimGroup, ...] = ()  # parameters with settings of their own, by name
    schedule: Schedule = "cosine"  # wsd: at the peak, then a decay at the end of the run
    min_lr_ratio: float = 0.0  # learning rate after the last step, relative to its peak
    min_lr: float | None = None  # the same for lr; the others' are in proportion; null: the ratio
    warmup_ratio: float | None = None  # share of the steps; null: warmup_steps, or else 0.05
    warmup_steps: int | None = None  # of w such steps, step i has lr x i / w; null: by ratio
    decay_steps: int | None = None  # cosine, linear: of warm-up and decay; wsd: of the last decay
    wsd_decay: WsdDecay = "exponential"  # curve of the last decay
    weight_decay: float = 0.0  # decoupled; not on norms and biases
    beta1: float = 0.9  # decay of Adam's mean of gradients
    beta2: float = 0.95  # decay of Adam's mean of squared gradients
    eps: float = 1e-8  # added to Adam's denominator
    clip_grad: float = 1.0  # largest norm of all gradients together; 0: no limit


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of the language model's linears, of which nothing else learns then."""

    targets: tuple[str, ...] = ()  # patterns over names, such as "*.{q,v}_proj"; empty: no adapters
    rank: int = 8  # rows of A, columns of B
    alpha: float = 16.0  # the product of B and A counts alpha / rank
    dropout: float = 0.0  # share of an adapter's inputs that are 0 in training
    dora: bool = False  # also learn the length of each row of the sum of weights (DoRA)
    init_from: str | None = None  # folder of peft whose adapters this run starts from


@dataclass(frozen=True)
class TrainConfig:
    """What is trained in this stage, and for how long."""

    stage: Literal["align", "pretrain", "instruct"] = "pretrain"  # names the run
    trains: tuple[Part, ...] = ("vision", "projector", "llm")  # the other parts are frozen
    global_batch_size: int = 64  # samples per optimizer step (about: data.step_packs_multiple)
    steps: int | None = 300  # optimizer steps; null: from epochs
    epochs: float = 1.0  # used where steps is null
    precision: Literal["fp32", "bf16"] = "fp32"  # of parameters and activations
    fp8: Literal["none", Fp8Recipe] = "none"  # recipe of the decoder's linears
    fp8_bf16_layers: int | None = None  # at each end, in bf16; null: 1, with delayed 0
    transformer_impl: Literal["auto", Implementation] = "auto"  # of linears and norms
    recompute: RecomputeGranularity = "none"  # of modules of each layer, or of whole layers
    recompute_modules: tuple[RecomputeModule, ...] = ("core_attn",)  # where recompute is selective
    recompute_layers: int | None = None  # full: the first so many of each stage; null: all
    recompute_visual_chunk: int | None = None  # visual rows recomputed at a time; null: all kept
    loss_chunk: int = 1024  # supervised rows whose logits are in memory at once
    ema_decay: float | None = None  # of a running mean of the weights, saved beside; null: none
    ema_start: int = 0  # steps before that mean begins; up to there it is the weights
    seed: int = 1234  # of initial weights and of the order of samples
    deterministic: bool = False  # the same bits each time; slower on a GPU, refuses some kernels
    device: Literal["auto", "cpu", "gpu"] = "auto"  # auto: a GPU where there is one; it must work


@dataclass(frozen=True)
class ValidationConfig:
    """The loss on samples that are not trained on; off without sources and share."""

    sources: tuple[SourceConfig, ...] = ()  # of their own, which training does not have
    share: float = 0.0  # of the training samples, held out by a hash of the first image or record
    salt: str = ""  # another one holds other samples out
    interval: int | None = None  # steps between passes; null: after the last step only
    samples: int | None = None  # most samples of a pass, the same ones each time; null: all


@dataclass(frozen=True)
class ScoresConfig:
    """Evaluation questions that checkpoints answer; off without benchmarks and questions."""

    benchmarks: tuple[BenchmarkName, ...] = ()  # those that are scored without a judge or a server
    data: str = "data/val"  # folder that holds the benchmarks' folders
    questions: str | None = None  # own question file with answers, scored by exact match
    image_folder: str | None = None  # folder that its image paths start in
    interval: int | None = None  # steps; of whole checkpoints; null: after the last step only
    samples: int | None = 200  # most questions of each, the same ones each time; null: all
    max_new_tokens: int | None = None  # of an answer; null: each benchmark's own, 128 for questions
    batch_size: int = 16  # questions answered at once
    device: Literal["auto", "cpu", "gpu"] = "auto"  # of the process that answers; auto: a GPU
    wait: bool = False  # training waits for the scores; false: they are made beside it
    examples: int = 4  # answers shown in trackers, with their images
    keep_export: bool = False  # keep the Hugging Face folder that answered


@dataclass(frozen=True)
class CheckpointConfig:
    """Where weights come from and go to."""

    init_from: str | None = None  # run folder or checkpoint whose weights start this run
    save_interval: int = 200  # steps; the last step is always saved
    asynchronous: bool = False  # write while training goes on; a stage's last save is awaited
    keep: int = 2  # newest whole checkpoints that stay on disk
    keep_every: int | None = None  # those of a step that it divides stay for ever; null: none
    keep_best: int = 0  # so many of the best ones by best_by stay as well
    best_by: str | None = None  # a metric of validation or scores, as validation/loss
    best_mode: Literal["auto", "min", "max"] = "auto"  # auto: min of a loss, max of all else
    also_export: bool = False  # a Hugging Face folder of each, run_dir/exports/step_XXXXXXXX
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
    run_name: str | None = None  # in trackers; null: the name of run_dir's folder
    project: str = "dattn"  # in trackers, which group runs by it
    tensorboard: bool = True  # write run_dir/tensorboard
    wandb: bool = False  # Weights & Biases; offline in run_dir/wandb unless a server is named
    wandb_server: str | None = None  # its address; null: that of WANDB_BASE_URL, or offline
    mlflow: bool = False  # MLflow; in run_dir/mlruns unless a server is named
    mlflow_server: str | None = None  # its tracking URI; null: MLFLOW_TRACKING_URI, or the folder
    update_ratio: bool = False  # of each part; copies the main weights in the last step of one
    communication_share: bool = False  # measured by a profiler in the last step of an interval


@dataclass(frozen=True)
class ProfileConfig:
    """Where the time of some steps goes: a trace of each rank, in run_dir/profile."""

    start: int | None = None  # first step of the window, from 1; null: nothing is profiled
    steps: int = 3  # of the window
    ranks: tuple[int, ...] = (0,)  # that write a trace
    memory: bool = False  # allocations in the trace; with a GPU also a snapshot of its memory
    nvtx: bool = False  # NVTX ranges for Nsight Systems instead of a trace; needs a GPU


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    scores: ScoresConfig = field(default_factory=ScoresConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
