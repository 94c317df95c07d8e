"""Rules for how a model is trained: precision, recompute, overlap; one line per breach."""

from __future__ import annotations

from collections.abc import Iterator

from dattn_mcore.architectures import language_models, text_features
from dattn_mcore.config.schema import Config

FP8_ROWS = 16  # rows and columns of an FP8 product are multiples of this
FP8_BLOCK = 128  # columns, or rows, of a block with one scale (blockwise)


def overlap(config: Config) -> Iterator[str]:
    """What may overlap with what, as Megatron-Core and Transformer Engine have it."""
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
    if config.train.transformer_impl == "local":
        yield f"{name} needs Transformer Engine; use train.transformer_impl=auto"
    if train.recompute_visual_chunk is not None:
        yield f"{name} cannot go with train.recompute_visual_chunk; set one of them off"
    if train.fp8 == "blockwise":
        yield (
            f"{name} cannot go with train.fp8=blockwise, for which Transformer Engine has no "
            "buffers; use the recipe tensorwise or delayed, or set the overlap off"
        )


def recompute(config: Config) -> Iterator[str]:
    """What backward may compute again."""
    train = config.train
    modules = train.recompute_modules
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
    if "layernorm" in modules and not _normed_inputs(config):
        yield (
            "train.recompute_modules with layernorm has no effect: layers of "
            f"model.family={config.model.family} have no norm before attention and MLP; leave "
            "layernorm out"
        )
    if "layernorm" in modules and config.train.transformer_impl == "local":
        yield (
            "train.recompute_modules with layernorm needs Transformer Engine; use "
            "train.transformer_impl=auto, or leave layernorm out"
        )
    if train.recompute_layers is not None:
        name = f"train.recompute_layers={train.recompute_layers}"
        if train.recompute != "full":
            yield f"{name} needs train.recompute=full, got {train.recompute}"
        if train.recompute_layers <= 0:
            yield f"{name} must be greater than 0, or null for all"


def _normed_inputs(config: Config) -> bool:
    """Whether layers norm what enters attention or MLP; an unknown family is refused elsewhere."""
    if config.model.family not in language_models():
        return True
    norms = text_features(config.model).norms
    return norms.attention_input is not None or norms.mlp_input is not None


def visual_chunk(config: Config) -> Iterator[str]:
    """Visual rows on their own, chunk by chunk."""
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


def fp8(config: Config) -> Iterator[str]:
    """Recipes, and sizes that FP8 products take."""
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
    if config.train.transformer_impl == "local":
        yield (
            f"{name} needs Transformer Engine; use train.transformer_impl=auto or "
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
    tp = config.parallel.tp
    multiple = FP8_BLOCK if train.fp8 == "blockwise" else FP8_ROWS
    for size, value, ranks in (
        ("hidden_size", llm.hidden_size, 1),
        ("ffn_hidden_size", llm.ffn_hidden_size, tp),
        ("head_dim times its heads", llm.num_query_groups * llm.head_dim, tp),
    ):
        # What ranks cannot divide breaks another rule.
        if value % ranks == 0 and value // ranks % multiple:
            yield (
                f"{name} needs model.llm.{size} (of a tensor parallel rank: {value // ranks}) to "
                f"be a multiple of {multiple}; use train.fp8=none"
            )
