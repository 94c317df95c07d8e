"""Builds the model in both specs and prints how they compare; see test_te_spec.py.

Runs in a process of its own, with tests/standins on the path: Megatron-Core's real Transformer
Engine wrappers, on stand-ins for Transformer Engine's modules.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

import torch
import torch.distributed as dist

from dattn_mcore.config.load import from_dict, merge
from dattn_mcore.parallel import platform
from tests.distributed.model_jobs import randomize_norms
from tests.distributed.small_models import AIMV2, CLIP, GEMMA, MINISTRAL3, SMALL_MODEL

BASELINE = {"attention": {"v2v": "causal", "t2v_position": "rope"}}
WHOLE = {"attention": {"fold_visual_projection": False, "skip_last_visual_rows": False}}
TP = {"parallel": {"tp": 2}}
SP = {"parallel": {"tp": 2, "sp": True}}
LORA = {
    "lora": {"targets": ["*_proj"], "rank": 3},
    "train": {"trains": ["llm"]},
    "checkpoint": {"init_from": "not-opened"},
}
CASES = {
    "mistral": (1, {}, {}),
    "gemma-clip": (1, merge(GEMMA, CLIP), {}),
    "baseline": (1, {}, BASELINE),
    "scaled-queries": (1, MINISTRAL3, {}),
    "unfolded": (1, GEMMA, WHOLE),
    "tp2": (2, {}, TP),
    "gemma-tp2-sp": (2, GEMMA, SP),
    "aimv2-tp2": (2, AIMV2, TP),
    "lora": (1, {}, merge(LORA, WHOLE)),
    "gemma-dora-tp2-sp": (2, GEMMA, merge(merge(LORA, SP), {"lora": {"dora": True}})),
}
LAYOUTS = [
    ((True, 16), (False, 9)),
    ((False, 5),),
    ((True, 16), (False, 4), (True, 16), (False, 6)),
]
MARKS = ("tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel")


def _state(model):
    """What identifies each parameter, alone and in a checkpoint."""
    found = {}
    for name, p in model.named_parameters():
        marks = [getattr(p, mark, None) for mark in MARKS]
        if not marks[0]:
            marks[:3] = [False, None, None]  # defaults of an attribute that is not split
        found[name] = [list(p.shape), str(p.dtype), marks[:3], bool(marks[3])]
    shards = {}
    for key, entry in model.sharded_state_dict().items():
        if key.endswith("_extra_state"):
            continue
        entries = entry.build() if hasattr(entry, "build") else [entry]
        shards[key] = [
            [e.key, list(e.global_shape), list(e.global_offset), list(e.replica_id)]
            if isinstance(e.replica_id, tuple)
            else [e.key, list(e.global_shape), list(e.global_offset), e.replica_id]
            for e in entries
        ]
    return {"parameters": found, "shards": shards}


def _losses(model, config):
    from dattn_mcore.config.checks import row_multiple
    from dattn_mcore.layers.layout import build_seq_params
    from dattn_mcore.models.dattn import ModelInputs

    generator = torch.Generator().manual_seed(3)
    params = build_seq_params(
        LAYOUTS, t2v_position=config.attention.t2v_position, multiple=row_multiple(config)
    )
    ids, labels = torch.randint(0, 300, (2, params.num_text), generator=generator)
    tiles = torch.randint(0, 256, (3, 3, 56, 56), generator=generator, dtype=torch.uint8)
    losses = model(ModelInputs(params=params, text_ids=ids, labels=labels, tiles=tiles))
    losses.sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return losses.detach(), gradients


def _randomize_adapters(model):
    """B of zeros would hide what A and the layers do with it; the same in both specs."""
    for name, p in model.named_parameters():
        if name.endswith(".lora.b"):
            generator = torch.Generator().manual_seed(sum(name.encode()))
            p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))


def compare(case: str) -> dict[str, object]:
    """Both specs of a case, on this rank."""
    from dattn_mcore.training.model import build_from_config
    from tests.distributed.jobs import start

    _, model, sections = CASES[case]
    tree = merge({"model": merge(SMALL_MODEL, model)}, sections)
    results, modules = {}, {}
    for name in ("local", "transformer_engine"):
        config, groups = start(merge(tree, {"train": {"transformer_impl": name}}))
        (built,) = build_from_config(config, groups, torch.device("cpu"))
        randomize_norms(built)
        _randomize_adapters(built)
        modules[name] = {type(module).__module__.partition(".")[0] for module in built.modules()}
        classes = {type(module).__name__ for module in built.modules()}
        results[name] = (_state(built), *_losses(built, config), classes)
        from dattn_mcore.parallel.groups import destroy_model_parallel

        destroy_model_parallel()
    (ours, losses, grads, _), (theirs, te_losses, te_grads, te_classes) = results.values()
    scale = max(float(g.abs().max()) for g in grads.values())
    return {
        "local": ours,
        "te": theirs,
        "te_classes": sorted(te_classes),
        "loss": float((losses - te_losses).abs().max() / losses.abs().max()),
        "gradient": max(float((grads[n] - te_grads[n]).abs().max()) / scale for n in grads),
    }


# An FP8 run that computes norms again in backward; not compared, the stand-ins have no FP8.
FP8_NORMS = {
    "train": {
        **{"precision": "bf16", "fp8": "tensorwise"},
        **{"recompute": "selective", "recompute_modules": ["layernorm"]},
    },
}


def kept_inputs() -> dict[str, list[bool]]:
    """For each decoder linear of such a run, by name: whether it keeps its input as it came."""
    from dattn_mcore.training.model import build_from_config
    from tests.distributed.jobs import start

    config, groups = start(merge({"model": SMALL_MODEL}, FP8_NORMS))
    (built,) = build_from_config(config, groups, torch.device("cpu"))
    found: dict[str, list[bool]] = {}
    for name, module in built.named_modules():
        if (
            "decoder.layers" in name
            and "vision" not in name
            and hasattr(module, "save_original_input")
        ):
            found.setdefault(name.rpartition(".")[2], []).append(module.save_original_input)
    return found


def overlap_buffers() -> dict[str, object]:
    """What is registered for overlapped exchanges, by recipe (Transformer Engine's stand-in)."""
    from transformer_engine.pytorch.module import base

    from dattn_mcore.training.model import start_overlap
    from dattn_mcore.training.runtime import decide_runtime

    asked = {
        "parallel": {"tp": 2, "sp": True, "tp_comm_overlap": True},
        "data": {"fixed_rows": True, "text_budget": 100, "visual_budget": 64},
        "train": {"transformer_impl": "transformer_engine", "precision": "bf16"},
    }
    recipes: dict[str, dict[str, Any]] = {
        "bf16": {},
        "delayed": {"fp8": "delayed"},
        "tensorwise": {"fp8": "tensorwise"},
        "no-edges": {"fp8": "tensorwise", "fp8_bf16_layers": 0},
    }
    for train in recipes.values():
        config = from_dict(merge(asked, {"train": train}))
        start_overlap(config, decide_runtime(config), torch.device("cpu"))
    return dict(zip(recipes, base.calls, strict=True))


OTHERS = {"fp8-norms": kept_inputs, "overlap": overlap_buffers}


def _rank(case: str, rank: int, world_size: int, store: str, output: str) -> None:
    platform.install("cpu")
    dist.init_process_group(
        platform.backend("cpu"),
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
    )
    result = OTHERS[case]() if case in OTHERS else compare(case)
    with open(f"{output}.{rank}", "w") as file:
        json.dump(result, file)


def main(case: str) -> None:
    """Runs a case on as many forked processes as it needs; prints rank 0's and the last one's."""
    from_dict({})
    import dattn_mcore.training.model  # noqa: F401  (import once, then fork)

    world_size = CASES[case][0] if case in CASES else 1
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world_size):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    _rank(case, rank, world_size, f"{folder}/store", f"{folder}/out")
                    status = 0
                except BaseException:  # noqa: BLE001
                    import traceback

                    traceback.print_exc()
                finally:
                    os._exit(status)
            children.append(child)
        failed = [os.waitpid(child, 0)[1] for child in children]
        if any(failed):
            sys.exit(1)
        results = [json.load(open(f"{folder}/out.{rank}")) for rank in range(world_size)]  # noqa: SIM115
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    for chosen in sys.argv[1:]:
        main(chosen)
        sys.stdout.write("\n")
