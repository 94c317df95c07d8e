"""Builds models in both layer specs and says how they compare."""

from __future__ import annotations

from typing import Any

import torch

from dattn_mcore.config.checks import row_multiple
from dattn_mcore.config.load import from_dict, merge
from dattn_mcore.config.schema import Config
from dattn_mcore.layers.layout import build_seq_params
from dattn_mcore.models.dattn import DattnModel, ModelInputs
from dattn_mcore.parallel.groups import destroy_model_parallel
from dattn_mcore.training.model import build_from_config, start_overlap
from dattn_mcore.training.runtime import decide_runtime
from tests.distributed.jobs import start
from tests.distributed.model_jobs import randomize_norms
from tests.distributed.small_models import SMALL_MODEL

SPECS = ("local", "transformer_engine")
LAYOUTS = [
    ((True, 16), (False, 9)),
    ((False, 5),),
    ((True, 16), (False, 4), (True, 16), (False, 6)),
]
MARKS = ("tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel")


def state(model: DattnModel) -> dict[str, Any]:
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
            [e.key, list(e.global_shape), list(e.global_offset), e.replica_id] for e in entries
        ]
    return {"parameters": found, "shards": shards}


def inputs_for(config: Config) -> ModelInputs:
    """Three samples with images, the same in every layout and spec."""
    generator = torch.Generator().manual_seed(3)
    params = build_seq_params(
        LAYOUTS, t2v_position=config.attention.t2v_position, multiple=row_multiple(config)
    )
    ids, labels = torch.randint(0, 300, (2, params.num_text), generator=generator)
    tiles = torch.randint(0, 256, (3, 3, 56, 56), generator=generator, dtype=torch.uint8)
    return ModelInputs(params=params, text_ids=ids, labels=labels, tiles=tiles)


def randomize_zeros(model: DattnModel) -> None:
    """Biases, and adapters' B, of zeros would hide what is done with them; the same in both specs."""
    for name, p in model.named_parameters():
        if name.endswith((".bias", ".lora.b")):
            generator = torch.Generator().manual_seed(sum(name.encode()))
            p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))


def compare(model: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    """Both specs of a tiny model, on this rank: states, and the distances of losses and gradients."""
    tree = merge({"model": merge(SMALL_MODEL, model)}, sections)
    results = {}
    for name in SPECS:
        config, groups = start(merge(tree, {"train": {"transformer_impl": name}}))
        (built,) = build_from_config(config, groups, torch.device("cpu"))
        randomize_norms(built)
        randomize_zeros(built)
        for module in built.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = False  # there is no DDP with buffers here
        losses = built(inputs_for(config))
        losses.sum().backward()
        gradients = {n: p.grad for n, p in built.named_parameters() if p.requires_grad}
        classes = {type(module).__name__ for module in built.modules()}
        results[name] = (state(built), losses.detach(), gradients, classes)
        destroy_model_parallel()
    (ours, losses, grads, _), (theirs, te_losses, te_grads, te_classes) = results.values()
    scale = max(float(g.abs().max()) for g in grads.values())
    return {
        "local": ours,
        "te": theirs,
        "te_classes": te_classes,
        "loss": float((losses - te_losses).abs().max() / losses.abs().max()),
        "gradient": max(float((grads[n] - te_grads[n]).abs().max()) / scale for n in grads),
    }


def compare_all(cases: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """`compare` of each case, by name."""
    return {name: compare(model, sections) for name, (model, sections) in cases.items()}


# An FP8 run that computes norms again in backward.
FP8_NORMS = {
    "train": {
        **{"precision": "bf16", "fp8": "tensorwise"},
        **{"recompute": "selective", "recompute_modules": ["layernorm"]},
    },
}


def kept_inputs() -> dict[str, list[bool]]:
    """For each decoder linear of such a run, by name: whether it keeps its input as it came."""
    config, groups = start(merge({"model": SMALL_MODEL}, FP8_NORMS))
    (built,) = build_from_config(config, groups, torch.device("cpu"))
    found: dict[str, list[bool]] = {}
    for name, module in built.decoder.layers.named_modules():
        if hasattr(module, "save_original_input"):
            found.setdefault(name.rpartition(".")[2], []).append(module.save_original_input)
    return found


def overlap_buffers() -> dict[str, list[Any]]:
    """What is registered for overlapped exchanges, by recipe: the shape, ranks and kinds."""
    from unittest import mock

    from transformer_engine.pytorch.module import base

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
    found = {}
    for name, train in recipes.items():
        config = from_dict(merge(asked, {"train": train}))
        with mock.patch.object(base, "initialize_ub", autospec=True) as registered:
            start_overlap(config, decide_runtime(config), torch.device("cpu"))
        call = registered.call_args.kwargs
        kinds = [mode.name for mode in call["quantization_modes"]]
        found[name] = [call["shape"], call["tp_size"], kinds]
    return found
