"""Rules for sizes of the model and of what goes into it; each returns one line per breach."""

from __future__ import annotations

from collections.abc import Iterator

from dattn_mcore.config.schema import Config, ModelConfig
from dattn_mcore.config.sharing import why_apart


def heads(config: Config) -> Iterator[str]:
    """Heads that groups, and widths that heads and rotary positions can divide."""
    llm, vision = config.model.llm, config.model.vision
    if llm.num_attention_heads % llm.num_query_groups:
        yield (
            f"model.llm.num_attention_heads={llm.num_attention_heads} must be a multiple of "
            f"model.llm.num_query_groups={llm.num_query_groups}; change one of them"
        )
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


def windows(config: Config) -> Iterator[str]:
    """Patterns of windows."""
    llm = config.model.llm
    if llm.layer_pattern and llm.sliding_window is None:
        yield (
            "model.llm.layer_pattern has no effect without model.llm.sliding_window; set the "
            "window, or leave the pattern out"
        )


def rope(config: Config) -> Iterator[str]:
    """Stretched rotary positions."""
    rope = config.model.llm.rope
    if rope.kind == "default" and rope.factor != 1:
        yield f"model.llm.rope.factor={rope.factor} has no effect with rope.kind=default"
    if rope.low_frequency_factor >= rope.high_frequency_factor:
        yield (
            f"model.llm.rope.low_frequency_factor={rope.low_frequency_factor} must be less than "
            f"high_frequency_factor={rope.high_frequency_factor}"
        )
    if rope.kind != "yarn":
        for name, unset in (("attention_factor", 1), ("query_scale_beta", 0)):
            if (value := getattr(rope, name)) != unset:
                yield (
                    f"model.llm.rope.{name}={value} has no effect with rope.kind={rope.kind}; "
                    "leave it out, or use rope.kind=yarn"
                )
        return
    if rope.beta_slow >= rope.beta_fast:
        yield (
            f"model.llm.rope.beta_slow={rope.beta_slow} must be less than "
            f"beta_fast={rope.beta_fast}"
        )
    if config.model.llm.rotary_base <= 1:
        yield (
            f"model.llm.rotary_base={config.model.llm.rotary_base} must be greater than 1 with "
            "rope.kind=yarn"
        )


def layers(config: Config) -> Iterator[str]:
    """Layers that pipeline stages and chunks can divide; what those need."""
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
        elif pp > 1 and (layers - first) % (pp - 1):
            yield (
                f"{name} leaves {layers - first} layers, which cannot be divided evenly to "
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


def parallel_sizes(config: Config) -> Iterator[str]:
    """Sizes that tensor parallel ranks can divide; one line, since `--tp` is one mistake."""
    llm, vision, tp = config.model.llm, config.model.vision, config.parallel.tp
    sizes = {
        "model.llm.num_attention_heads": llm.num_attention_heads,
        "model.llm.ffn_hidden_size": llm.ffn_hidden_size,
        "model.llm.vocab_pad_multiple": llm.vocab_pad_multiple,
    }
    if config.parallel.tower == "tensor":
        sizes |= {
            "model.vision.num_attention_heads": vision.num_attention_heads,
            "model.vision.ffn_hidden_size": vision.ffn_hidden_size,
            "model.projector.ffn_hidden_size": config.model.projector.ffn_hidden_size,
        }
    if tp % llm.num_query_groups:  # where the groups divide tp, several ranks share each
        sizes = {"model.llm.num_query_groups": llm.num_query_groups, **sizes}
    uneven = [f"{name}={value}" for name, value in sizes.items() if value % tp]
    if uneven:
        number = "a multiple" if len(uneven) == 1 else "multiples"
        yield (f"{', '.join(uneven)} must be {number} of parallel.tp={tp}; choose another --tp")


def _video(model: ModelConfig) -> Iterator[str]:
    """The grid of a frame, and the axis of time."""
    grid = model.vision.grid_size
    if not 0 <= model.video.frame_grid <= grid:
        yield (
            f"model.video.frame_grid={model.video.frame_grid} must lie between 1 and the {grid} "
            "patches along a side of model.vision's tile, or be 0 for all of them"
        )
    if model.video.time_entries < 2:
        yield (
            f"model.video.time_entries={model.video.time_entries} must be 2 at least: a video's "
            "first and last frame"
        )


def vision(config: Config) -> Iterator[str]:
    """Tiles, and room for an image in a micro-batch."""
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
    yield from _video(config.model)
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


def sources(config: Config) -> Iterator[str]:
    """Sources of samples."""
    for number, source in enumerate(config.data.sources):
        name = f"data.sources[{number}]"
        if not source.annotations:
            yield f"{name}.annotations is empty; name a file, or a pattern like shards/*.tar"
        if source.weight <= 0:
            yield f"{name}.weight={source.weight} must be greater than 0; leave the source out"
    if config.data.group_images and (reason := why_apart(config)) is not None:
        yield (
            "data.group_images=true puts samples of the same images into one step so that they "
            f"share visual rows, and here none does ({reason}); set it to false"
        )
