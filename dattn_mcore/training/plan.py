"""What `--dry-run` prints: the resolved configuration, the layout, parameters and rows per rank."""

from __future__ import annotations

from dataclasses import replace

from dattn_mcore.config.checks import data_parallel_size, processes_per_replica
from dattn_mcore.config.load import to_yaml
from dattn_mcore.config.schema import Config
from dattn_mcore.layers.attention import BackendChoice, choose_backend
from dattn_mcore.layers.spec import attention_options
from dattn_mcore.models.transformer_configs import params_dtype
from dattn_mcore.parallel.platform import resolve_device


def describe(config: Config, world_size: int) -> str:
    """The dry run's text.

    Args:
        config: a checked configuration.
        world_size: processes started; with one, as many as one replica needs are assumed.
    """
    parallel = config.parallel
    world = processes_per_replica(config) if world_size == 1 else world_size
    dp = data_parallel_size(config, world)
    vision = config.model.vision
    rows = vision.rows_per_tile
    lines = [
        to_yaml(config),
        f"layout: {world} processes = tp {parallel.tp} x pp {parallel.pp} x dp {dp}"
        + (f", {parallel.vpp} chunks per stage" if parallel.vpp > 1 else "")
        + (", sequence parallel" if parallel.sp else ""),
        "",
        f"{'stage':>5}  {'parameters per rank':>20}  {'trained':>14}  holds",
    ]
    for stage in range(parallel.pp):
        total, trained, holds = stage_summary(config, stage)
        lines.append(f"{stage:>5}  {total:>20,}  {trained:>14,}  {holds}")
    shards = parallel.tp if parallel.sp else 1
    text, visual = config.data.text_budget, config.data.visual_budget
    lines += [
        "",
        f"rows of a full micro-batch: {visual:,} visual ({visual // rows} images of {rows} rows) "
        f"and {text:,} text",
        f"rows per rank between layers: {visual // shards:,} visual and {text // shards:,} text",
        f"global batch: {config.train.global_batch_size} samples",
        *_attention_lines(config),
        "",
    ]
    return "\n".join(lines)


def attention_backends(config: Config, device_type: str) -> list[tuple[str, BackendChoice]]:
    """The attention backend of each kind of layer, and why.

    Args:
        config: a checked configuration.
        device_type: cpu, or another for a GPU.

    Returns:
        (which layers, choice); one entry where all layers are alike.

    Raises:
        ConfigError: the backend asked for cannot run there or compute this model.
    """
    options, every = attention_options(config), config.model.llm.sliding_window_every
    kinds = [("all layers", options)]
    if options.window is not None and every > 1:
        kinds = [("windowed layers", options), ("other layers", replace(options, window=None))]
    head_dim, dtype = config.model.llm.head_dim, params_dtype(config)
    chosen = [
        (name, choose_backend(config.attention.backend, kind, device_type, dtype, head_dim))
        for name, kind in kinds
    ]
    alike = len({choice for _, choice in chosen}) == 1
    return [("all layers", chosen[0][1])] if alike else chosen


def _attention_lines(config: Config) -> list[str]:
    """The backends for the device of the run, which this machine need not have."""
    device = config.train.device
    if device == "auto":
        device = resolve_device("auto")
    lines = []
    for layers, choice in attention_backends(config, device):
        lines.append(f"attention backend on a {device.upper()}: {choice.name}, {layers}")
        lines[-1] += f" ({choice.reason})"
    return lines


def stage_summary(config: Config, stage: int) -> tuple[int, int, str]:
    """Parameters on one rank of a stage, those trained, and what it holds; from shapes alone."""
    parallel, llm, vision = config.parallel, config.model.llm, config.model.vision
    tp, h, trains = parallel.tp, llm.hidden_size, config.train.trains
    layers = llm.num_layers // parallel.pp
    query, kv = llm.num_attention_heads * llm.head_dim, 2 * llm.num_query_groups * llm.head_dim
    norms = (4 if llm.post_norms else 2) * h
    layer = (h * (query + kv) + query * h + 3 * h * llm.ffn_hidden_size) // tp + norms
    vocabulary = llm.padded_vocab_size * h // tp
    parts = {"llm": layers * layer, "vision": 0, "projector": 0}
    holds = [f"layers {stage * layers}-{(stage + 1) * layers - 1}"]
    if parallel.vpp > 1:
        chunk = layers // parallel.vpp
        starts = [(c * parallel.pp + stage) * chunk for c in range(parallel.vpp)]
        holds = ["layers " + ", ".join(f"{s}-{s + chunk - 1}" for s in starts)]
    if stage == 0:
        parts["llm"] += vocabulary
        v, f = vision.hidden_size, vision.ffn_hidden_size
        clip = vision.kind == "clip"
        patches = vision.rows_per_tile
        block = (4 * v * v + 3 * v + 2 * v * f + f) // tp + v + v + 4 * v
        parts["vision"] = (vision.num_layers + 1 + vision.select_layer) * block
        parts["vision"] += 3 * vision.patch_size**2 * v + (3 * v if clip else v)
        parts["vision"] += 2 * v if not clip and vision.select_layer == -1 else 0
        width = config.model.projector.ffn_hidden_size
        parts["projector"] = (v * width + width + width * h) // tp + h + 2 * h
        if config.model.visual_positions:
            parts["vision"] += (patches + clip) * v
            parts["projector"] += 2 * 2 * (h * h + h)
        holds = ["vision tower", "projector", "embedding", *holds]
    if stage == parallel.pp - 1:
        parts["llm"] += h
        if not llm.tie_embeddings or parallel.pp > 1:
            parts["llm"] += vocabulary
        holds += ["final norm", "output layer"]
    return sum(parts.values()), sum(parts[part] for part in set(trains)), ", ".join(holds)
