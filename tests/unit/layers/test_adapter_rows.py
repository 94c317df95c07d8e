"""Which rows of a fused linear's shard belong to which Hugging Face linear."""

import pytest
import torch

from dattn_mcore.architectures.parameters import STACKED, Entry, Mix
from dattn_mcore.checkpoint.mixing import join
from dattn_mcore.layers.lora import part_of_rows


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_keys_and_values(tp_size):
    """As the weights are mixed and cut, with more ranks than groups too."""
    mix = Mix("interleaved", groups=2)
    entry = Entry("kv", {"k": (8, 1), "v": (8, 1)}, mix, tp_axis=0)
    whole = join(entry, [torch.zeros(8, 1), torch.ones(8, 1)])
    shards = [part_of_rows(mix, [8, 8], rank, tp_size) for rank in range(tp_size)]
    assert torch.equal(torch.cat(shards), whole[:, 0].long())


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_gate_and_up(tp_size):
    """Each rank has its share of both, one behind the other."""
    for rank in range(tp_size):
        rows = part_of_rows(STACKED, [8, 8], rank, tp_size)
        assert rows.tolist() == [0] * (8 // tp_size) + [1] * (8 // tp_size)
