"""What the pool's workers run: the gradients of a step of shared images, in any layout."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed.finalize_model_grads import finalize_model_grads

from dattn_mcore.data.pipeline import DataPipeline
from dattn_mcore.data.tokenizer import load_tokenizer
from dattn_mcore.training.inputs import all_model_inputs, needs_pixels
from dattn_mcore.training.model import build_from_config
from dattn_mcore.training.optimizer import wrap_ddp
from dattn_mcore.training.step import run_schedule, sum_reports
from tests.distributed.gradient_jobs import pieces
from tests.distributed.jobs import start
from tests.distributed.model_jobs import randomize_norms
from tests.distributed.shared_images_jobs import to_float64

# Key in the whole model, its shape, where the piece starts, and the piece.
Piece = tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]


def gradients_of_data(tree: dict[str, Any]) -> tuple[list[Piece], float, int]:
    """This rank's gradients of the first step, reduced as in training, of a float64 model.

    Gradients are added up in float32, as training does, so that each is rounded once a micro-batch.

    Args:
        tree: of the configuration.

    Returns:
        Pieces, the same on all replicas; mean loss of the step; visual rows it computed.
    """
    config, groups = start(tree)
    tokenizer = load_tokenizer(config.data.tokenizer)
    pipeline = DataPipeline(
        config,
        tokenizer,
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        microbatch_multiple=1,
        needs_pixels=needs_pixels(groups),
    )
    try:
        batch = pipeline.global_batch(0)
    finally:
        pipeline.close()
    chunks = build_from_config(config, groups, torch.device("cpu"))
    for chunk in chunks:
        randomize_norms(chunk)
        to_float64(chunk)
        chunk.config.pipeline_dtype = torch.float64
    wrapped = wrap_ddp(chunks, config, groups)
    for chunk in wrapped:
        chunk.force_all_reduce = True  # every rank gets all of a gradient, not its part
    chunks[0].config.finalize_model_grads_func = _finalize
    inputs = all_model_inputs(batch.microbatches, config, groups, torch.device("cpu"))
    reports = run_schedule(wrapped, inputs, groups, forward_only=False)
    sums, _ = sum_reports(reports, inputs[0])
    found = [
        (piece.key, tuple(piece.global_shape), tuple(piece.global_offset), piece.data)
        for chunk in chunks
        for _, piece in pieces(chunk)
    ]
    return found, float(sums[0, 0] / sums[0, 2]), batch.visual_tokens


def _finalize(model: Any, num_tokens: Any = None, **named: Any) -> None:
    finalize_model_grads(model, num_tokens, **{**named, "force_all_reduce": True})
