"""Functions of the compiled module over lists of tensors: optimizer, norms of gradients, scales."""

from __future__ import annotations

import torch

Lists = list[list[torch.Tensor]]


@torch.no_grad()
def multi_tensor_adam(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Adam's update of (gradients, parameters, averages, squares); a fifth list: float32 masters."""
    masters = tensor_lists[4] if len(tensor_lists) == 5 else tensor_lists[1]
    correction1 = 1 - beta1**step if bias_correction else 1.0
    correction2 = 1 - beta2**step if bias_correction else 1.0
    rows = zip(*tensor_lists[:4], masters, strict=True)
    for gradient, parameter, mean, square, master in rows:
        g, p = gradient.float(), master.float()
        if mode == 0:  # L2 regularisation; 1 is AdamW
            g = g + weight_decay * p
        m = beta1 * mean.float() + (1 - beta1) * g
        v = beta2 * square.float() + (1 - beta2) * g * g
        update = (m / correction1) / ((v / correction2).sqrt() + epsilon)
        if mode == 1:
            update = update + weight_decay * p
        p = p - lr * update
        mean.copy_(m)
        square.copy_(v)
        master.copy_(p)
        if parameter is not master:
            parameter.copy_(p)


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: Lists, per_tensor: bool | None = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm over all tensors [1], and of each."""
    norms = torch.stack([t.float().norm() for t in tensor_lists[0]])
    return norms.norm()[None], norms if per_tensor else norms.new_empty(0)


@torch.no_grad()
def multi_tensor_scale(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: Lists, scale: float
) -> None:
    """The second list is the first, scaled."""
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source.float() * scale)
        if not bool(torch.isfinite(target).all()):
            noop_flag.fill_(1)
