"""What the pool's workers ask of a model without a run: its outputs, its weights, its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dattn_mcore.config.checks import row_multiple
from dattn_mcore.types import image_shapes
from tests.distributed.jobs import start


def randomize_norms(model: torch.nn.Module) -> None:
    """Norm weights of one would hide a misplaced norm; these are the same in every layout."""
    for entry in model.sharded_state_dict().values():
        if "norm.weight" in entry.key:
            layer = entry.global_offset[0] if entry.prepend_axis_num else 0
            generator = torch.Generator().manual_seed(sum(entry.key.encode()) + 1000 * layer)
            entry.data.data += 0.2 * torch.randn(entry.data.shape, generator=generator)


def model_outputs(
    tree: dict[str, Any],
    layouts: Any,
    changed_tile: int | None = None,
    checkpoint: str | None = None,
    pixels: list[int] | None = None,
    image_grids: tuple[tuple[int, int], ...] = (),
):
    """Logits of all text rows for random ids and tiles, and what an oracle needs to repeat them.

    Works in any layout: the last stage gathers its vocabulary shards, and every rank returns the
    same ids, tiles and visual rows. With `checkpoint` its weights are loaded as a run does by
    `checkpoint.init_from`; with `pixels` (a shape) the tower's features of random pixels come too.
    """
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from dattn_mcore.checkpoint.load import load_weights
    from dattn_mcore.layers.layout import build_seq_params
    from dattn_mcore.models.dattn import ModelInputs
    from dattn_mcore.training.model import build_from_config

    config, groups = start(tree)
    (model,) = build_from_config(config, groups, torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    if checkpoint is None:
        randomize_norms(model)
    else:
        load_weights(Path(checkpoint), config, [model], groups)
    params = build_seq_params(
        layouts, t2v_position=config.attention.t2v_position, multiple=row_multiple(config)
    )
    rows = {
        kind: sum(n for layout in layouts for is_visual, n in layout if is_visual == kind)
        for kind in (True, False)
    }
    text_ids = torch.zeros(params.num_text, dtype=torch.int64)
    text_ids[: rows[False]] = torch.randint(0, 320, (rows[False],), generator=generator)
    size = config.model.vision.image_size
    tiles = torch.randint(
        0,
        256,
        (rows[True] // config.model.vision.rows_per_tile, 3, size, size),
        generator=generator,
        dtype=torch.uint8,
    )
    if changed_tile is not None:
        tiles[changed_tile] = 255 - tiles[changed_tile]
    inputs = ModelInputs(
        params=params,
        text_ids=text_ids,
        labels=torch.full_like(text_ids, -100),
        tiles=tiles if rows[True] else None,
        items=image_shapes(image_grids),
    )
    model.eval()
    result: dict[str, Any] = {
        "text_ids": text_ids,
        "tiles": tiles,
        "visual_rows": torch.zeros(0, 64),
    }
    with torch.no_grad():
        if model.pre_process and rows[True]:
            result["visual_rows"] = model._visual_rows(
                tiles, torch.float32, image_shapes(image_grids)
            )[:, 0]
        if pixels is not None:
            result["pixels"] = torch.randn(pixels, generator=generator)
            result["features"] = model.vision(result["pixels"]) if model.pre_process else None
        if not model.pre_process:
            shards = config.parallel.tp if config.parallel.sp else 1
            hidden = torch.empty(
                (params.num_visual + params.num_text) // shards, 1, config.model.llm.hidden_size
            )
            dist.recv(hidden, src=dist.get_global_rank(groups.pp, groups.pp.rank() - 1))
            model.set_input_tensor(hidden)
        output = model(inputs, return_logits=True)
        if model.post_process:
            logits = gather_from_tensor_model_parallel_region(output, group=groups.tp)
            result["logits"] = logits[:, : config.model.llm.vocab_size]
        else:
            dist.send(output, dst=dist.get_global_rank(groups.pp, groups.pp.rank() + 1))
    visual = [result["visual_rows"], result.get("features")]
    dist.broadcast_object_list(visual, src=0)
    result["visual_rows"], result["features"] = visual
    if dist.get_world_size() == 1:
        result["weights"] = {
            name: tensor for name, tensor in model.state_dict().items() if tensor is not None
        }
    return result


def load_and_save(tree: dict[str, Any], source: str, target: str) -> None:
    """Loads a checkpoint into this layout and saves the weights again from it."""
    from dattn_mcore.checkpoint.files import begin_save
    from dattn_mcore.checkpoint.load import load_weights
    from dattn_mcore.checkpoint.state import model_state
    from dattn_mcore.training.model import build_from_config
    from tools.checkpoint_convert.dist_checkpoint import write_manifest

    config, groups = start(tree)
    chunks = build_from_config(config, groups, torch.device("cpu"))
    load_weights(Path(source), config, chunks, groups)
    if dist.get_rank() == 0:
        Path(target).mkdir(parents=True)
    dist.barrier()
    begin_save(model_state(chunks, groups), Path(target), groups.dp_cp).execute_sync()
    dist.barrier()
    if dist.get_rank() == 0:
        write_manifest(Path(target), config)


def count_parameters(tree: dict[str, Any]) -> tuple[int, tuple[int, int]]:
    """This rank's stage, and its parameters: all and those that train."""
    from dattn_mcore.training.model import build_from_config

    config, groups = start(tree)
    chunks = build_from_config(config, groups, torch.device("cpu"), initialize=False)
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    total = sum(p.numel() for p in parameters)
    return groups.pp.rank(), (total, sum(p.numel() for p in parameters if p.requires_grad))
