"""What the pool's workers run: functions named by the tests, on every rank of a world."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dattn_mcore.config.checks import check_config, data_parallel_size, row_multiple
from dattn_mcore.config.load import from_dict, merge
from dattn_mcore.config.schema import Config
from dattn_mcore.parallel.groups import initialize_model_parallel
from dattn_mcore.training.loop import train

SMALL_MODEL: dict[str, Any] = {
    "llm": {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 16,
        "init_std": 0.05,
    },
    "vision": {
        "patch_size": 14,
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 2,
        "init_std": 0.05,
    },
    "projector": {"ffn_hidden_size": 48},
}
GEMMA: dict[str, Any] = {
    "family": "gemma2",
    "llm": {
        "attention_softcap": 5.0,
        "final_softcap": 3.0,
        "query_scale": 24.0,
        "sliding_window": 6,
        "layer_pattern": ["sliding", "full"],
        "tie_embeddings": True,
    },
}

GEMMA3: dict[str, Any] = {
    "family": "gemma3",
    "llm": {
        "query_scale": 24.0,
        "sliding_window": 6,
        "layer_pattern": ["sliding", "sliding", "full"],
        "rotary_base": 1000.0,
        "sliding_rotary_base": 100.0,
        "rope": {"kind": "linear", "factor": 8.0},
        "tie_embeddings": True,
    },
}
LLAMA: dict[str, Any] = {
    "family": "llama",
    "llm": {"rope": {"kind": "llama3", "factor": 8.0, "original_length": 32}},
}
MINISTRAL3: dict[str, Any] = {
    "family": "ministral3",
    "llm": {
        "rope": {  # of eight frequencies some as they were, some divided, some between
            "kind": "yarn",
            "factor": 8.0,
            "original_length": 8,
            "beta_slow": 0.02,
            "beta_fast": 1.0,
            "truncate": False,
            "attention_factor": 1.3,
            "query_scale_beta": 0.4,
        }
    },
}
QWEN2: dict[str, Any] = {"family": "qwen2"}
QWEN3: dict[str, Any] = {"family": "qwen3"}
CLIP: dict[str, Any] = {
    "vision": {"kind": "clip", "activation": "quick_gelu", "select_layer": -2},
}
AIMV2: dict[str, Any] = {"vision": {"kind": "aimv2", "activation": "silu", "norm_eps": 1e-5}}
SMOLLM3: dict[str, Any] = {
    "family": "smollm3",
    "llm": {"rotary_pattern": [True, True, True, False], "tie_embeddings": True},
}


def small_config(data_dir: Path, run_dir: Path, **sections: Any) -> dict[str, Any]:
    """A configuration tree for a tiny model on the digits data."""
    tree: dict[str, Any] = {
        "model": SMALL_MODEL,
        "data": {
            "annotations": str(data_dir / "instruct.json"),
            "image_folder": str(data_dir / "images"),
            "tokenizer": str(data_dir / "tokenizer.model"),
            "template": "mistral",
            "prepare": "none",
            "text_budget": 128,
            "visual_budget": 96,
            "image_backend": "pillow",
            "prefetch": 1,
        },
        "optim": {"lr": 3e-3, "warmup_ratio": 0.0},
        "train": {"global_batch_size": 12, "steps": 3},
        "log": {"run_dir": str(run_dir), "interval": 1, "tensorboard": False},
        "checkpoint": {"save_interval": 1000},
    }
    return merge(tree, sections)


def start(tree: dict[str, Any]) -> tuple[Config, Any]:
    """Checks the configuration and creates its process groups."""
    config = from_dict(tree)
    check_config(config)
    data_parallel_size(config, dist.get_world_size())
    return config, initialize_model_parallel(config.parallel, config.train.seed)


def run_training(tree: dict[str, Any]) -> bool:
    """The whole training loop; True if it reached its last step."""
    config, groups = start(tree)
    return train(config, groups, torch.device("cpu"))


def run_training_of_rank(trees: list[dict[str, Any]]) -> bool:
    """The whole training loop; each rank has a configuration of its own."""
    return run_training(trees[dist.get_rank()])


def wait_for_a_slow_rank(folder: str) -> bool:
    """The last rank comes late; returns whether the others waited for it."""
    from dattn_mcore.parallel.groups import wait_for_all

    came = Path(folder) / "came"
    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(1)
        came.write_text("")
    wait_for_all("a slow rank")
    return came.exists()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl."""
    text = (Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def train_until_killed(tree: dict[str, Any], step: int) -> bool:
    """Trains, and sends this process a stopping signal when a step begins."""
    import os
    import signal

    from dattn_mcore.training import loop

    original = loop.train_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        counted.calls += 1
        if counted.calls == step and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    counted.calls = 0
    loop.train_step = counted
    try:
        return run_training(tree)
    finally:
        loop.train_step = original


def train_with_a_dead_first_step(tree: dict[str, Any], step: int) -> bool:
    """Like `train_until_killed`, with an older schedule, whose step 1 had rate 0."""
    from unittest import mock

    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from dattn_mcore.training import setup

    def build(config: Config, optimizer: Any, total_steps: int) -> OptimizerParamScheduler:
        optim = config.optim
        return OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=optim.lr,
            min_lr=optim.lr * optim.min_lr_ratio,
            lr_warmup_steps=min(round(optim.warmup_ratio * total_steps), total_steps - 1),
            lr_decay_steps=total_steps,
            lr_decay_style="cosine",
            start_wd=optim.weight_decay,
            end_wd=optim.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    with mock.patch.object(setup, "build_scheduler", build):
        return train_until_killed(tree, step)


def saves_until_killed(tree: dict[str, Any], step: int) -> list[int]:
    """Like `train_until_killed`; returns the steps that were saved."""
    from dattn_mcore.checkpoint.save import CheckpointSaver

    original = CheckpointSaver.save
    saved: list[int] = []

    def noted(saver: CheckpointSaver, at: int, metrics: Any = None) -> Any:
        saved.append(at)
        return original(saver, at, metrics)

    CheckpointSaver.save = noted
    try:
        train_until_killed(tree, step)
    finally:
        CheckpointSaver.save = original
    return saved


def adam_steps_after_resume(tree: dict[str, Any]) -> list[float]:
    """Resumes, does one step, and returns Adam's step count of every parameter."""
    from dattn_mcore.training import loop

    seen: list[float] = []
    original = loop.train_step

    def one_step(model, optimizer, *args):
        result = original(model, optimizer, *args)
        inner = optimizer.chained_optimizers[0].optimizer
        if not seen:
            seen.extend(float(state["step"]) for state in inner.state.values())
        return result

    loop.train_step = one_step
    try:
        run_training(tree)
    finally:
        loop.train_step = original
    return seen


class FusedAdam(torch.optim.Optimizer):
    """Transformer Engine's, as far as a checkpoint sees it: its groups, its count of steps.

    Source: TransformerEngine, `pytorch/optimizers/fused_adam.py`.
    """

    def __init__(self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float):
        names = dict(lr=lr, bias_correction=True, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, names)

    @torch.no_grad()
    def step(self) -> None:
        """AdamW with the step in the group."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            assert isinstance(group["step"], int) and group["bias_correction"]
            (beta1, beta2), step = group["betas"], group["step"]
            for p in group["params"]:
                state = self.state[p]
                mean = state.setdefault("exp_avg", torch.zeros_like(p))
                square = state.setdefault("exp_avg_sq", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - beta1)
                square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                root = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**step))


def train_with_fused_adam(tree: dict[str, Any], until: int | None = None) -> bool:
    """A run where Megatron-Core finds Transformer Engine's Adam; killed in step `until`."""
    from unittest import mock

    from megatron.core.optimizer import distrib_optimizer

    with (
        mock.patch.object(torch.optim, "AdamW", FusedAdam),
        mock.patch.object(distrib_optimizer, "HAVE_APEX_OR_TE", True),
        mock.patch.object(distrib_optimizer, "USING_TE_OPTIMIZER", True),
    ):
        return run_training(tree) if until is None else train_until_killed(tree, until)


def run_training_with_log(tree: dict[str, Any]) -> tuple[bool, str]:
    """Like `run_training`; also returns what was logged."""
    import io
    import logging

    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("dattn_mcore")
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        return run_training(tree), stream.getvalue()
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


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
        image_grids=image_grids,
    )
    model.eval()
    result: dict[str, Any] = {
        "text_ids": text_ids,
        "tiles": tiles,
        "visual_rows": torch.zeros(0, 64),
    }
    with torch.no_grad():
        if model.pre_process and rows[True]:
            result["visual_rows"] = model._visual_rows(tiles, torch.float32, image_grids)[:, 0]
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
    from megatron.core import dist_checkpointing

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
    dist_checkpointing.save(model_state(chunks, groups), target, ("torch_dist", 1))
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


def agree_on(kind: str) -> tuple[str, str]:
    """The last rank has an error of a kind; returns what this rank raises: its type and message."""
    from dattn_mcore import errors
    from dattn_mcore.data.sources.record import RecordError
    from dattn_mcore.training.agreement import agree

    made = {
        "RecordError": RecordError("no id", "7"),
        "ConfigError": errors.ConfigError("first", "second"),
        "UnknownError": type("UnknownError", (errors.DattnError,), {})("new here"),
    }
    mine = None
    if dist.get_rank() == dist.get_world_size() - 1:
        mine = made[kind] if kind in made else getattr(errors, kind)("it is so")
    try:
        agree(mine, torch.device("cpu"))
    except errors.DattnError as error:
        return type(error).__name__, str(error)
    return "", ""


def check_folder(run_dirs: list[str]) -> None:
    """The start-up check of the checkpoint folder; each rank is given its own path."""
    from dattn_mcore.training import start_checks

    start_checks.SHARED_FOLDER_SECONDS = 0.5
    start_checks.check_checkpoint_folder(Path(run_dirs[dist.get_rank()]), torch.device("cpu"))


def weights_by_step(tree: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Trains; returns this rank's weights before the first step and after each."""
    from dattn_mcore.training import loop

    original = loop.train_step
    seen: list[dict[str, torch.Tensor]] = []

    def noted(model: Any, *args: Any) -> Any:
        def weights() -> dict[str, torch.Tensor]:
            return {k: p.detach().clone() for k, p in model[0].module.named_parameters()}

        if not seen:
            seen.append(weights())
        result = original(model, *args)
        seen.append(weights())
        return result

    loop.train_step = noted
    try:
        run_training(tree)
    finally:
        loop.train_step = original
    return seen


def train_with_poison(tree: dict[str, Any], poison: str) -> tuple[str, bool]:
    """Trains; in step 2 the last rank's weights or gradients turn to NaN.

    Returns:
        What the run raised, and whether the other weights are those from before the step.
    """
    from dattn_mcore.errors import DattnError
    from dattn_mcore.training import loop

    original, seen = loop.train_step, {"calls": 0}
    last = dist.get_rank() == dist.get_world_size() - 1

    def poisoned(model, *args):
        seen["calls"] += 1
        if seen["calls"] == 2:
            weights = dict(model[0].module.named_parameters())
            name = "decoder.final_layernorm.weight"
            victim = weights.pop(name)
            seen["model"] = weights
            seen["before"] = {k: p.detach().clone() for k, p in weights.items()}
            if last and poison == "weight":
                victim.data[0] = torch.nan
            elif last:
                next(iter(weights.values())).register_hook(lambda grad: grad * torch.nan)
        return original(model, *args)

    loop.train_step = poisoned
    try:
        run_training(tree)
    except DattnError as error:
        before: Any = seen["before"]
        now: Any = seen["model"]
        return str(error), all(torch.equal(before[k], now[k]) for k in before)
    finally:
        loop.train_step = original
    return "", False


def train_without_last_save(tree: dict[str, Any]) -> bool:
    """The training loop alone: the save at its end takes as long as its steps here.

    Where gradients are reduced while backward goes on, their buckets are so small that there are
    many of them.
    """
    from unittest import mock

    from dattn_mcore.checkpoint.save import CheckpointSaver
    from dattn_mcore.training import optimizer

    small = functools.partial(optimizer.DistributedDataParallelConfig, bucket_size=2000)
    overlaps = tree.get("parallel", {}).get("overlap_grad_reduce", False)
    with (
        mock.patch.object(CheckpointSaver, "save", lambda saver, step, metrics=None: None),
        mock.patch.object(optimizer, "DistributedDataParallelConfig", small)
        if overlaps
        else contextlib.nullcontext(),
    ):
        return run_training(tree)
