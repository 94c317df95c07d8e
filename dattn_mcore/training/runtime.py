"""How a run's model is computed: from its settings and what is found on this machine."""

from __future__ import annotations

import torch

from dattn_mcore.config.schema import Config
from dattn_mcore.errors import ConfigError
from dattn_mcore.layers.runtime import Fp8, Recompute, Runtime
from dattn_mcore.parallel.platform import adds_gradients, current_device
from dattn_mcore.training.implementation import choose_implementation
from dattn_mcore.types import Implementation


def params_dtype(config: Config) -> torch.dtype:
    """Dtype of parameters and activations."""
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def decide_runtime(config: Config) -> Runtime:
    """Decides everything that depends on the machine, once, on the device that is installed.

    Args:
        config: a checked configuration.

    Raises:
        ConfigError: a setting needs Transformer Engine, and it cannot be used or is not what this
            run takes; or this GPU knows no FP8.
    """
    implementation = choose_implementation(config)
    _check_needs(config, implementation)
    parallel, train, on_cpu = config.parallel, config.train, current_device().type == "cpu"
    return Runtime(
        implementation=implementation,
        dtype=params_dtype(config),
        fp8=_fp8(config),
        recompute=Recompute(
            granularity=train.recompute,
            modules=train.recompute_modules,
            layers=train.recompute_layers,
            visual_chunk=train.recompute_visual_chunk,
        ),
        loss_chunk=train.loss_chunk,
        sequence_parallel=parallel.sp,
        tower=parallel.tower,
        tp_comm_overlap=parallel.tp_comm_overlap,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        # Transformer Engine's linears always can; Megatron-Core's own need Apex's extension, or
        # what stands in for it (`parallel.fewer_passes`).
        gradient_accumulation_fusion=implementation == "transformer_engine" or adds_gradients(),
        chunks_per_stage=parallel.vpp,
        first_stage_layers=parallel.first_stage_layers,
        # The interleaved schedule empties an output while it is still being sent. A GPU's stream
        # keeps the memory until then; a CPU's sender would read what has been freed.
        deallocate_pipeline_outputs=parallel.vpp == 1 or not on_cpu,
        deterministic=train.deterministic,
        image_mean=config.data.image_mean,
        image_std=config.data.image_std,
    )


def _check_needs(config: Config, implementation: Implementation) -> None:
    if implementation == "transformer_engine":
        return
    if config.parallel.tp_comm_overlap:
        raise ConfigError(
            "parallel.tp_comm_overlap=true needs Transformer Engine, and this run takes the local "
            "linears; set it off"
        )
    train = config.train
    if train.recompute == "selective" and "layernorm" in train.recompute_modules:
        raise ConfigError(
            "train.recompute_modules with layernorm needs Transformer Engine, and this run "
            "takes the local linears; leave layernorm out"
        )


def _fp8(config: Config) -> Fp8 | None:
    recipe, layers = config.train.fp8, config.train.fp8_bf16_layers
    if recipe == "none":
        return None
    if layers is None:  # the scales of `delayed` are reduced once for all layers
        layers = 0 if recipe == "delayed" else 1
    return Fp8(recipe=recipe, bf16_layers=layers)
