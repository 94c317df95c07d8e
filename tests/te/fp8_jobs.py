"""What Transformer Engine's layers do in FP8: which products, with which scales and sizes."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from dattn_mcore.config.load import merge
from dattn_mcore.models.dattn import DattnModel
from dattn_mcore.training.model import build_from_config
from tests.distributed.jobs import start
from tests.distributed.small_models import SMALL_MODEL
from tests.te.casts import is_quantized
from tests.te.spec_jobs import inputs_for

LINEARS = ("linear_q", "linear_kv", "linear_proj", "linear_fc1", "linear_fc2")


def _build(sections: dict[str, Any]) -> tuple[DattnModel, Any]:
    train = {"transformer_impl": "transformer_engine", "precision": "bf16"}
    config, groups = start(merge(merge({"model": SMALL_MODEL}, {"train": train}), sections))
    (model,) = build_from_config(config, groups, torch.device("cpu"))
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = False  # there is no DDP with buffers here
    return model, inputs_for(config)


def _linears(model: DattnModel) -> dict[tuple[int, str], Any]:
    """The decoder's linears by layer (from 0) and name."""
    return {
        (layer.layer_number - 1, name.rpartition(".")[2]): module
        for layer in model.decoder.layers
        for name, module in layer.named_modules()
        if name.rpartition(".")[2] in LINEARS
    }


def products(sections: dict[str, Any]) -> dict[str, Any]:
    """Products of a forward and a backward pass.

    Returns:
        `forward`: by layer, the linears whose product is in FP8; `backward`: how many are; `loss`.
    """
    import transformer_engine_torch as tex

    model, inputs = _build(sections)
    current: list[Any] = [None]
    found: dict[str, Any] = {"forward": {}, "backward": 0}
    for key, module in _linears(model).items():
        module.register_forward_pre_hook(lambda *args, key=key: current.__setitem__(0, key))
        module.register_forward_hook(lambda *args: current.__setitem__(0, None))
    multiply = tex.generic_gemm

    def counted(a: Any, *args: Any, **kwargs: Any) -> Any:
        if is_quantized(a):
            if current[0] is None:
                found["backward"] += 1
            else:
                layer, name = current[0]
                found["forward"].setdefault(layer, []).append(name)
        return multiply(a, *args, **kwargs)

    with mock.patch.object(tex, "generic_gemm", counted):
        losses = model(inputs)
        losses.sum().backward()
    found["loss"] = float(losses.detach().sum())
    return found


def histories(sections: dict[str, Any]) -> dict[str, Any]:
    """Scales of delayed scaling after one step, and what they must be made of (layer 1, `linear_q`)."""
    model, inputs = _build(sections)
    linear = _linears(model)[1, "linear_q"]
    seen: dict[str, float] = {}
    linear.register_forward_pre_hook(
        lambda module, args: seen.update(input=float(args[0].detach().float().abs().max()))
    )
    model(inputs).sum().backward()
    forward, backward = linear.fp8_meta["scaling_fwd"], linear.fp8_meta["scaling_bwd"]
    return {
        "input": seen["input"],
        "weight": float(linear.weight.detach().float().abs().max()),
        "scales": forward.scale.tolist(),
        "newest": forward.amax_history[-1].tolist(),
        "first": forward.amax_history[0].tolist(),
        "length": forward.amax_history.shape[0],
        "gradient_scales": backward.scale.tolist(),
        "gradient_newest": backward.amax_history[-1].tolist(),
    }


def rows_taken(rows: list[int]) -> dict[int, str | None]:
    """Whether a linear of 64 x 64 in FP8 takes so many rows; the reason where it does not."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8CurrentScaling

    linear = te.Linear(64, 64, params_dtype=torch.bfloat16, device="cpu")
    found: dict[int, str | None] = {}
    for count in rows:
        x = torch.randn(count, 64, dtype=torch.bfloat16, requires_grad=True)
        try:
            with te.fp8_autocast(enabled=True, fp8_recipe=Float8CurrentScaling()):
                y = linear(x)
            y.sum().backward()
            found[count] = None
        except (AssertionError, ValueError) as error:
            found[count] = str(error)
    return found


def updates_agree(algorithm: str) -> float:
    """Distance of Transformer Engine's own update of scales from the one that stands in."""
    import os

    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    recipe = DelayedScaling(amax_history_len=3, amax_compute_algo=algorithm)
    results = []
    for unfused in ("0", "1"):
        os.environ["NVTE_UNFUSED_FP8_UPDATE"] = unfused
        FP8GlobalStateManager.reset()
        torch.manual_seed(1)
        linear = te.Linear(32, 32, params_dtype=torch.bfloat16, device="cpu")
        for step in range(5):
            x = (5 - step) * torch.randn(32, 32, dtype=torch.bfloat16)
            with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
                y = linear(x)
            y.sum().backward()
        meta = linear.fp8_meta
        results.append(
            torch.cat(
                [
                    tensor.flatten()
                    for way in ("scaling_fwd", "scaling_bwd")
                    for tensor in (meta[way].scale, meta[way].amax_history)
                ]
            )
        )
    del os.environ["NVTE_UNFUSED_FP8_UPDATE"]
    return float((results[0] - results[1]).abs().max())
