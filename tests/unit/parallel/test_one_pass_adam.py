"""PyTorch's AdamW in one kernel a tensor, also after a checkpoint that was saved without."""

import torch

from dattn_mcore.parallel.fewer_passes import adam_in_one_pass


def steps(optimizer, parameter, gradients):
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def test_it_learns_what_the_plain_one_learns():
    torch.manual_seed(0)
    start, gradients = torch.randn(64), torch.randn(5, 64)
    settings = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    ends = []
    for fused in (False, True):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([parameter], **settings)
        if fused:
            adam_in_one_pass(optimizer)
        ends.append(steps(optimizer, parameter, gradients))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-6, atol=1e-7)
    assert not torch.equal(ends[0], start)


def test_another_optimizer_stays_as_it_is():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    adam_in_one_pass(optimizer)
    assert not optimizer.param_groups[0].get("fused")
    adam_in_one_pass(None)
