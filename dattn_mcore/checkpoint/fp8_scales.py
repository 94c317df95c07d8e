"""Scales of FP8 delayed scaling in a checkpoint, so that a resumed run goes on with them.

Transformer Engine's own extra states hold them too, pickled; a checkpoint here holds tensors alone.
All ranks of a pipeline stage have the same scales, so they load into any layout. Other recipes find
their scales in each step anew and have none to keep.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_rank
from torch import Tensor

from dattn_mcore.checkpoint.content import FP8
from dattn_mcore.models.dattn import DattnModel

_HISTORY = "amax_history"


def tensors_of(chunks: list[DattnModel]) -> dict[str, Tensor]:
    """Scales and histories of this rank's linears by layer, direction and kind.

    They are made where no step has made them yet; empty without delayed scaling.
    """
    found: dict[str, Tensor] = {}
    for chunk in chunks:
        if not chunk.config.fp8 or chunk.config.fp8_recipe != "delayed":
            continue
        layer: Any
        module: Any
        for layer in chunk.decoder.layers:
            for name, module in layer.named_modules():
                if not hasattr(module, "init_fp8_meta_tensors"):
                    continue
                meta = module.fp8_meta
                if "scaling_fwd" not in meta:
                    meta["num_gemms"] = 1
                    module.init_fp8_meta_tensors(get_fp8_recipe(chunk.config))
                for way in ("fwd", "bwd"):
                    place = f"{layer.layer_number - 1}.{name}.{way}"
                    found[f"{place}.scale"] = meta[f"scaling_{way}"].scale
                    found[f"{place}.{_HISTORY}"] = meta[f"scaling_{way}"].amax_history
    return found


def share_newest(tensors: dict[str, Tensor], pg_collection: ProcessGroupCollection) -> None:
    """Gives all ranks of a stage the largest of their newest magnitudes, before a save.

    What a rank has seen since the last update (in a validation pass) waits in the first row of its
    own histories. The next update takes the largest of all ranks, so this changes no scale.
    """
    histories = [tensor for name, tensor in tensors.items() if name.endswith(_HISTORY)]
    if not histories:
        return
    newest = torch.cat([history[0] for history in histories])
    for group in (pg_collection.tp, pg_collection.dp_cp):
        dist.all_reduce(newest, op=dist.ReduceOp.MAX, group=group)
    pieces = newest.split([history.shape[1] for history in histories])
    for history, piece in zip(histories, pieces, strict=True):
        history[0].copy_(piece)


def scales_state(
    tensors: dict[str, Tensor], pg_collection: ProcessGroupCollection
) -> dict[str, ShardedTensor]:
    """Sharded state of `tensors_of`, whole on each rank of a stage."""
    replica = (0, get_pg_rank(pg_collection.tp), get_pg_rank(pg_collection.dp_cp))
    return {
        name: ShardedTensor.from_rank_offsets(f"{FP8}{name}", tensor, replica_id=replica)
        for name, tensor in tensors.items()
    }
