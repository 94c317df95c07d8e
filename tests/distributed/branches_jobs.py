"""What the pool's workers run for records with branches: losses of a step as the data give it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from dattn_mcore.data.pipeline import DataPipeline
from dattn_mcore.data.tokenizer import load_tokenizer
from dattn_mcore.training.inputs import to_model_inputs
from dattn_mcore.training.model import build_from_config
from dattn_mcore.types import IGNORED_LABEL
from tests.distributed.jobs import start
from tests.distributed.model_jobs import randomize_norms
from tests.distributed.shared_images_jobs import to_float64


def losses_of_data(
    tree: dict[str, Any],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """Losses and gradients of the one micro-batch of the first step, in float64, by autograd alone.

    Args:
        tree: of the configuration.

    Returns:
        Losses of the labelled rows of each text, by id and place among the texts of that id
        ("a.0", "a.1"); gradients of their mean; visual rows that were computed.
    """
    config, groups = start(tree)
    tokenizer = load_tokenizer(config.data.tokenizer)
    pipeline = DataPipeline(
        config, tokenizer, dp_rank=0, dp_size=1, microbatch_multiple=1, needs_pixels=True
    )
    try:
        (micro,) = pipeline.global_batch(0).microbatches
    finally:
        pipeline.close()
    (model,) = build_from_config(config, groups, torch.device("cpu"))
    randomize_norms(model)
    to_float64(model)
    inputs = to_model_inputs(micro, config, groups, torch.device("cpu"))
    losses = model(inputs)
    losses.mean().backward()
    gradients = {
        name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None
    }
    texts = [sum(n for is_visual, n in layout if not is_visual) for layout in micro.layouts]
    labelled = [int((part != IGNORED_LABEL).sum()) for part in micro.labels.split(texts)]
    found: dict[str, torch.Tensor] = {}
    times: Counter[str] = Counter()
    parts = losses.detach().double().split(labelled)
    for name, part in zip(micro.sample_ids, parts, strict=True):
        found[f"{name}.{times[name]}"] = part
        times[name] += 1
    return found, gradients, micro.num_tiles * config.model.vision.rows_per_tile
