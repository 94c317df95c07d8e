"""Rules that settings must keep, each a small function that returns one line per breach."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from dattn_mcore.config.schema import Config
from dattn_mcore.errors import ConfigError

CHOICES: dict[str, tuple[str, ...]] = {
    "model.family": ("mistral", "gemma2"),
    "model.vision.kind": ("siglip", "clip"),
    "model.llm.activation": ("silu", "gelu_tanh"),
    "model.vision.activation": ("gelu_tanh", "gelu", "quick_gelu"),
    "attention.v2v": ("diagonal", "causal"),
    "attention.t2v_position": ("none", "rope"),
    "attention.merge": ("alpha", "sum"),
    "attention.backend": ("auto", "reference", "sdpa", "flash", "triton"),
    "data.template": ("plain", "mistral", "gemma"),
    "data.prepare": ("none", "digits"),
    "data.over_budget": ("skip", "truncate", "error"),
    "data.image_backend": ("auto", "dali", "pillow"),
    "data.image_policy": ("stretch", "pad", "crop", "anyres_stretch", "anyres_letterbox"),
    "train.stage": ("align", "pretrain", "instruct"),
    "model.transformer_impl": ("auto", "local", "transformer_engine"),
    "train.precision": ("fp32", "bf16"),
    "train.fp8": ("none", "delayed", "tensorwise", "blockwise"),
    "train.recompute": ("none", "selective", "full"),
    "train.device": ("auto", "cpu", "gpu"),
}
RECOMPUTABLE = ("core_attn", "layernorm", "mlp")
FP8_ROWS = 16  # rows and columns of an FP8 product are multiples of this
FP8_BLOCK = 128  # columns of a block with one scale (blockwise)
PARTS = ("vision", "projector", "llm")


def check_config(config: Config) -> None:
    """Checks everything that does not depend on the number of processes.

    Raises:
        ConfigError: the first rule that is broken.
    """
    for check in (
        *(_choices, _positive, _sources, _heads, _layers, _vocabulary),
        *(_vision, _visual_chunk, _training, _overlap, _recompute, _fp8, _unbuilt),
    ):
        for message in check(config):
            raise ConfigError(message)


def data_parallel_size(config: Config, world_size: int) -> int:
    """Data parallel replicas of a world; the rest of the processes share one model.

    Raises:
        ConfigError: the world is no multiple of tp x pp x cp.
    """
    parallel = config.parallel
    one_model = processes_per_replica(config)
    if world_size % one_model:
        product = f"tp ({parallel.tp}) x pp ({parallel.pp})"
        if parallel.cp > 1:
            product += f" x cp ({parallel.cp})"
        raise ConfigError(
            f"{product} needs a multiple of {one_model} processes, got {world_size}; "
            f"run torchrun --nproc-per-node {one_model} pretrain_dattn.py ..."
        )
    return world_size // one_model


def processes_per_replica(config: Config) -> int:
    """Processes that hold one copy of the model."""
    return config.parallel.tp * config.parallel.pp * config.parallel.cp


def row_multiple(config: Config) -> int:
    """What visual and text rows of a micro-batch are padded to a multiple of.

    Every sequence parallel shard holds as many rows as the others, and in FP8 a multiple of 16.
    """
    shards = config.parallel.tp if config.parallel.sp else 1
    per_shard = FP8_ROWS if config.train.fp8 != "none" else 1
    return math.lcm(config.data.pad_multiple, shards * per_shard)


def value_of(config: Config, name: str) -> Any:
    """The value of a dotted field name."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _choices(config: Config) -> Iterator[str]:
    for name, allowed in CHOICES.items():
        if value_of(config, name) not in allowed:
            yield f"{name}={value_of(config, name)!r} is unknown; use one of {', '.join(allowed)}"


def _positive(config: Config) -> Iterator[str]:
    for name in (
        *("parallel.tp", "parallel.pp", "parallel.vpp", "parallel.cp", "parallel.timeout_minutes"),
        *("model.llm.num_layers", "model.llm.hidden_size", "model.vision.num_layers"),
        *("data.text_budget", "data.visual_budget", "data.pad_multiple", "data.decode_threads"),
        *("data.prefetch", "train.global_batch_size", "train.epochs", "optim.lr"),
        *("train.loss_chunk",),
        *("checkpoint.save_interval", "checkpoint.keep", "log.interval"),
        "health.start_timeout_seconds",
    ):
        if value_of(config, name) <= 0:
            yield f"{name}={value_of(config, name)} must be greater than 0"
    if config.train.steps is not None and config.train.steps <= 0:
        yield f"train.steps={config.train.steps} must be greater than 0, or null for train.epochs"
    multiple = config.data.step_packs_multiple
    if multiple is not None and multiple <= 0:
        yield f"data.step_packs_multiple={multiple} must be greater than 0, or null"
    for limit in ("step", "checkpoint"):
        name = f"health.{limit}_timeout_seconds"
        if value_of(config, name) < 0:
            yield f"{name}={value_of(config, name)} must be at least 0 (0: no limit)"
    for name in ("optim.warmup_ratio", "optim.min_lr_ratio"):
        if not 0 <= value_of(config, name) <= 1:
            yield f"{name}={value_of(config, name)} must lie between 0 and 1"


def _heads(config: Config) -> Iterator[str]:
    llm, vision, tp = config.model.llm, config.model.vision, config.parallel.tp
    if llm.num_attention_heads % llm.num_query_groups:
        yield (
            f"model.llm.num_attention_heads={llm.num_attention_heads} must be a multiple of "
            f"model.llm.num_query_groups={llm.num_query_groups}; change one of them"
        )
    for name, value in (
        ("model.llm.num_query_groups", llm.num_query_groups),
        ("model.llm.num_attention_heads", llm.num_attention_heads),
        ("model.llm.ffn_hidden_size", llm.ffn_hidden_size),
        ("model.vision.num_attention_heads", vision.num_attention_heads),
        ("model.vision.ffn_hidden_size", vision.ffn_hidden_size),
        ("model.projector.ffn_hidden_size", config.model.projector.ffn_hidden_size),
    ):
        if value % tp:
            yield f"{name}={value} must be a multiple of parallel.tp={tp}; choose another --tp"
    if vision.hidden_size % vision.num_attention_heads:
        yield (
            f"model.vision.hidden_size={vision.hidden_size} must be a multiple of "
            f"model.vision.num_attention_heads={vision.num_attention_heads}"
        )
    if llm.head_dim % 2 or llm.hidden_size % 2:
        yield (
            f"model.llm.head_dim={llm.head_dim} and model.llm.hidden_size={llm.hidden_size} "
            "must be even (rotary and sinusoidal positions come in pairs)"
        )


def _layers(config: Config) -> Iterator[str]:
    layers, pp, vpp = config.model.llm.num_layers, config.parallel.pp, config.parallel.vpp
    first = config.parallel.first_stage_layers
    if first is not None:
        name = f"parallel.first_stage_layers={first}"
        if pp == 1:
            yield f"{name} needs --pp of at least 2"
        if vpp > 1:
            yield f"{name} with parallel.vpp={vpp} is not implemented; use one of them"
        if not 0 < first < layers:
            yield f"{name} must leave layers of model.llm.num_layers={layers} to other stages"
        if (layers - first) % (pp - 1):
            yield (
                f"{name} leaves {layers - first} layers, which cannot be dealt evenly to "
                f"{pp - 1} stages; choose another number or another --pp"
            )
    elif layers % (pp * vpp):
        yield (
            f"model.llm.num_layers={layers} must be a multiple of pp ({pp}) x vpp ({vpp}); "
            "choose another --pp or parallel.vpp"
        )
    if vpp > 1 and pp == 1:
        yield f"parallel.vpp={vpp} needs --pp of at least 2; use parallel.vpp=1"
    if config.parallel.sp and config.parallel.tp == 1:
        yield "parallel.sp=true needs --tp of at least 2; use parallel.sp=false"


def _overlap(config: Config) -> Iterator[str]:
    parallel, train = config.parallel, config.train
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield (
            "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true; "
            "Megatron-Core overlaps both or gradients alone"
        )
    if parallel.overlap_grad_reduce and train.recompute_visual_chunk is not None:
        yield (
            "parallel.overlap_grad_reduce=true cannot go with train.recompute_visual_chunk="
            f"{train.recompute_visual_chunk}, which adds to a gradient chunk by chunk; set one "
            "of them off"
        )
    if not parallel.tp_comm_overlap:
        return
    name = "parallel.tp_comm_overlap=true"
    if not parallel.sp:
        yield f"{name} needs parallel.sp=true and --tp of at least 2"
    if not config.data.fixed_rows:
        yield f"{name} needs data.fixed_rows=true: its buffers have one size"
    if config.model.transformer_impl == "local":
        yield f"{name} needs Transformer Engine; use model.transformer_impl=auto"
    if train.recompute_visual_chunk is not None:
        yield f"{name} cannot go with train.recompute_visual_chunk; set one of them off"


def _vocabulary(config: Config) -> Iterator[str]:
    llm, tp = config.model.llm, config.parallel.tp
    if llm.vocab_pad_multiple % tp:
        yield (
            f"model.llm.vocab_pad_multiple={llm.vocab_pad_multiple} must be a multiple of "
            f"parallel.tp={tp}"
        )


def _vision(config: Config) -> Iterator[str]:
    vision = config.model.vision
    if not -vision.num_layers <= vision.select_layer <= -1:
        yield (
            f"model.vision.select_layer={vision.select_layer} must lie between "
            f"-{vision.num_layers} and -1 (-2: without the last layer)"
        )
    if vision.patch_size > vision.image_size:
        yield (
            f"model.vision.patch_size={vision.patch_size} must not exceed "
            f"model.vision.image_size={vision.image_size}"
        )
    data = config.data
    grids = [list(grid) for grid in data.anyres_grids]
    if not grids or any(min(grid) < 1 or grid == [1, 1] for grid in grids):
        yield (
            f"data.anyres_grids={grids} must be pairs [columns, rows] of at least two tiles (one "
            "tile is the base view, which every image has); write [[1, 2], [2, 1], [2, 2]]"
        )
        return
    rows, tiles = vision.rows_per_tile, data.max_tiles
    if rows * tiles > data.visual_budget:
        of_tiles = f" of {tiles} tiles (data.image_policy={data.image_policy})" if tiles > 1 else ""
        yield (
            f"data.visual_budget={data.visual_budget} must hold at least one image{of_tiles}: "
            f"{rows * tiles} rows"
        )


def _visual_chunk(config: Config) -> Iterator[str]:
    chunk, tp = config.train.recompute_visual_chunk, config.parallel.tp
    if chunk is None:
        return
    name = f"train.recompute_visual_chunk={chunk}"
    if chunk <= 0:
        yield f"{name} must be greater than 0, or null for no recompute of visual rows"
    if config.attention.v2v != "diagonal":
        yield (
            f"{name} needs attention.v2v=diagonal (visual rows that see no other row), got "
            f"attention.v2v={config.attention.v2v}; use train.recompute=full"
        )
    if config.parallel.sp and chunk < tp:
        yield f"{name} must be at least parallel.tp={tp} with parallel.sp=true"


def _sources(config: Config) -> Iterator[str]:
    for number, source in enumerate(config.data.sources):
        name = f"data.sources[{number}]"
        if not source.annotations:
            yield f"{name}.annotations is empty; name a file, or a pattern like shards/*.tar"
        if source.weight <= 0:
            yield f"{name}.weight={source.weight} must be greater than 0; leave the source out"
        if source.format not in ("auto", "json", "tar", "parquet"):
            yield f"{name}.format={source.format!r} is unknown; use one of auto, json, tar, parquet"
    if not 0 <= config.data.max_bad_share <= 1:
        yield f"data.max_bad_share={config.data.max_bad_share} must lie between 0 and 1"


def _training(config: Config) -> Iterator[str]:
    trains = config.train.trains
    unknown = [part for part in trains if part not in PARTS]
    if unknown or not trains:
        yield f"train.trains={list(trains)} must name one or more of {', '.join(PARTS)}"


def _recompute(config: Config) -> Iterator[str]:
    train = config.train
    modules = train.recompute_modules
    unknown = [name for name in modules if name not in RECOMPUTABLE]
    if unknown:
        yield (
            f"train.recompute_modules: {unknown[0]!r} is unknown; use some of "
            f"{', '.join(RECOMPUTABLE)}"
        )
    if not modules:
        yield "train.recompute_modules=[] must name at least one; or use train.recompute=none"
    if modules != ("core_attn",) and train.recompute != "selective":
        yield (
            f"train.recompute_modules={list(modules)} needs train.recompute=selective, got "
            f"{train.recompute}"
        )
    if "layernorm" in modules and train.fp8 == "delayed":
        yield (
            "train.recompute_modules with layernorm cannot go with train.fp8=delayed; use the "
            "recipe tensorwise or blockwise"
        )
    if "layernorm" in modules and config.model.transformer_impl == "local":
        yield (
            "train.recompute_modules with layernorm needs Transformer Engine; use "
            "model.transformer_impl=auto, or leave layernorm out"
        )
    if train.recompute_layers is not None:
        name = f"train.recompute_layers={train.recompute_layers}"
        if train.recompute != "full":
            yield f"{name} needs train.recompute=full, got {train.recompute}"
        if train.recompute_layers <= 0:
            yield f"{name} must be greater than 0, or null for all"


def _fp8(config: Config) -> Iterator[str]:
    train, llm = config.train, config.model.llm
    if train.fp8 == "none":
        if train.fp8_bf16_layers is not None:
            yield f"train.fp8_bf16_layers={train.fp8_bf16_layers} needs train.fp8"
        return
    name = f"train.fp8={train.fp8}"
    if train.precision != "bf16":
        yield f"{name} needs train.precision=bf16, got {train.precision}"
    if train.device == "cpu":
        yield f"{name} needs a GPU; use train.fp8=none with train.device=cpu"
    if config.model.transformer_impl == "local":
        yield (
            f"{name} needs Transformer Engine; use model.transformer_impl=auto or "
            "transformer_engine"
        )
    if train.recompute_visual_chunk is not None:
        yield (
            f"{name} with train.recompute_visual_chunk={train.recompute_visual_chunk} is not "
            "implemented; use train.recompute=full"
        )
    edge = train.fp8_bf16_layers
    if train.fp8 == "delayed" and edge:
        yield (
            f"train.fp8_bf16_layers={edge} cannot go with train.fp8=delayed, whose scales are "
            "reduced once for all layers; use 0, or the recipe tensorwise or blockwise"
        )
    if edge is not None and not 0 <= 2 * edge < llm.num_layers:
        yield (
            f"train.fp8_bf16_layers={edge} at each end must leave some of "
            f"model.llm.num_layers={llm.num_layers} in FP8"
        )
    for size, value in (
        ("hidden_size", llm.hidden_size),
        ("ffn_hidden_size", llm.ffn_hidden_size // config.parallel.tp),
        ("head_dim times its heads", llm.num_query_groups * llm.head_dim // config.parallel.tp),
    ):
        multiple = FP8_BLOCK if train.fp8 == "blockwise" else FP8_ROWS
        if value % multiple:
            yield (
                f"{name} needs model.llm.{size} (of a tensor parallel rank: {value}) to be a "
                f"multiple of {multiple}; use train.fp8=none"
            )


def _unbuilt(config: Config) -> Iterator[str]:
    if config.parallel.cp > 1:
        yield f"parallel.cp={config.parallel.cp}: only cp 1 is implemented; use tp, pp and dp"
