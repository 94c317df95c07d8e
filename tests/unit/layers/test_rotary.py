"""Rotation of packed rows against Megatron-Core's public function, bit by bit."""

import types

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

from dattn_mcore.layers.attention.rotary import rotary_angles, rotate


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_bits_are_those_of_megatron_core(dtype):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(23, 3, 16, generator=generator).to(dtype).requires_grad_()
    angles = rotary_angles(
        torch.randint(0, 9000, (23,), generator=generator), 100.0 ** -(torch.arange(0, 16, 2) / 16)
    )
    config = types.SimpleNamespace(
        apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False
    )
    # The group is that of context parallelism, which unpacked rows do not ask for.
    theirs = apply_rotary_pos_emb(rows[:, None], angles, config, cp_group=object())[:, 0]
    ours = rotate(rows, angles)
    assert ours.dtype == dtype and torch.equal(ours, theirs)
    weight = torch.randn(rows.shape, generator=generator).to(dtype)
    gradients = [torch.autograd.grad((out * weight).sum(), rows)[0] for out in (ours, theirs)]
    assert torch.equal(*gradients)
