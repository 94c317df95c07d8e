"""How a model is computed on the machine at hand, decided once before it is built.

What the model is stands in `ModelConfig` and `AttentionConfig` (`architectures.sizes`); layers and
models take these three records and process groups, and know no run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dattn_mcore.types import (
    Fp8Recipe,
    Implementation,
    RecomputeGranularity,
    RecomputeModule,
    TowerWork,
)

Channels = tuple[float, float, float]  # red, green, blue


@dataclass(frozen=True)
class Fp8:
    """Products of the decoder's linears in FP8.

    Attributes:
        recipe: of Transformer Engine.
        bf16_layers: decoder layers at each end that are computed in bf16.
    """

    recipe: Fp8Recipe
    bf16_layers: int = 0


@dataclass(frozen=True)
class Recompute:
    """What backward computes again instead of keeping it.

    Attributes:
        granularity: nothing, some modules of each layer, or whole layers.
        modules: which ones, where it is `selective`.
        layers: the first so many of each stage, where it is `full`; None: all.
        visual_chunk: visual rows of a pack that are computed at a time, before the text rows; None:
            all rows go together.
    """

    granularity: RecomputeGranularity = "none"
    modules: tuple[RecomputeModule, ...] = ("core_attn",)
    layers: int | None = None
    visual_chunk: int | None = None


@dataclass(frozen=True)
class Runtime:
    """How a model is computed; the defaults are right everywhere, and the fastest nowhere.

    Sizes of the tensor and pipeline parallel groups are those of the groups themselves.

    Attributes:
        implementation: whose linears and norms the layers are made of.
        dtype: of parameters and activations.
        fp8: None: no product is computed in FP8.
        recompute: what backward computes again.
        loss_chunk: supervised rows whose logits are in memory at once.
        sequence_parallel: norms and residuals are shared over the tensor parallel group.
        tower: how tensor parallel ranks divide the vision tower and the projector: `tensor`, each
            computes its part of every tile; `tiles`, each has all their weights and computes some
            of the tiles.
        tp_comm_overlap: Transformer Engine's exchanges beside products; its buffers must have been
            registered (`layers.spec_te.start_overlap`).
        overlap_grad_reduce, overlap_param_gather: what the DDP around the model does while backward
            and forward go on; it must be given the same.
        gradient_accumulation_fusion: the decoder's linears add their weights' gradients into DDP's
            buffers. Without such buffers it must be off.
        chunks_per_stage: model chunks of a pipeline stage (interleaved schedule, where > 1).
        first_stage_layers: decoder layers of the first stage; None: as many as others.
        deallocate_pipeline_outputs: the schedule empties what it has handed to the sender.
        deterministic: takes only what gives the same bits each time.
        image_mean, image_std: of pixels in 0..1, by channel; what the tower was trained with.

    Raises:
        ValueError: two fields cannot go together.
    """

    implementation: Implementation = "local"
    dtype: torch.dtype = torch.float32
    fp8: Fp8 | None = None
    recompute: Recompute = field(default_factory=Recompute)
    loss_chunk: int = 1024
    sequence_parallel: bool = False
    tower: TowerWork = "tensor"
    tp_comm_overlap: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    gradient_accumulation_fusion: bool = False
    chunks_per_stage: int = 1
    first_stage_layers: int | None = None
    deallocate_pipeline_outputs: bool = True
    deterministic: bool = False
    image_mean: Channels = (0.5, 0.5, 0.5)
    image_std: Channels = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        recompute = self.recompute
        norms_again = recompute.granularity == "selective" and "layernorm" in recompute.modules
        of_transformer_engine = {
            "fp8": self.fp8 is not None,
            "tp_comm_overlap": self.tp_comm_overlap,
            "recompute of layernorm": norms_again,
        }
        for name, wanted in of_transformer_engine.items():
            if wanted and self.implementation != "transformer_engine":
                raise ValueError(f"{name} needs implementation='transformer_engine'")
        if self.fp8 is not None and self.dtype is not torch.bfloat16:
            raise ValueError(f"fp8 needs dtype=torch.bfloat16, got {self.dtype}")
        if self.overlap_grad_reduce and recompute.visual_chunk is not None:
            raise ValueError(
                "overlap_grad_reduce cannot go with recompute.visual_chunk, which adds to a "
                "gradient chunk by chunk"
            )
