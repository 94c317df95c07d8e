"""What a rank sends in a collective, and what the tracer records of one."""

import pytest
import torch
import torch.distributed as dist

from dattn_mcore.parallel.collectives import Collective, Tracer, group_names
from dattn_mcore.parallel.groups import single_process


@pytest.mark.parametrize(
    ("operation", "sent"),
    [
        ("all_reduce", 2 * 3 / 4 * 64),
        ("all_gather", 3 / 4 * 64),
        ("reduce_scatter", 3 / 4 * 64),
        ("all_to_all", 3 / 4 * 64),
        ("send", 64),
        ("receive", 0),
    ],
)
def test_bytes_that_a_rank_sends(operation, sent):
    one = Collective(operation, "tp", size=4, shape=(16,), dtype="float32", nbytes=64)
    assert one.sent == sent


def test_what_a_rank_sends_to_itself_does_not_count():
    one = Collective("all_to_all", "cp", size=4, shape=(16,), dtype="float32", nbytes=64, kept=24)
    assert one.sent == 40


def test_calls_are_recorded_by_group_shape_and_bytes():
    with single_process() as groups, Tracer(group_names(groups)) as tracer:
        dist.all_reduce(torch.ones(3, 2), group=groups.tp)
        dist.broadcast(torch.ones(5, dtype=torch.int64), src=0)
        dist.all_gather_into_tensor(torch.empty(4), torch.ones(4), group=groups.pp)
        dist.all_to_all_single(torch.empty(3, 2), torch.ones(3, 2), [3], [3], group=groups.cp)
        dist.barrier()
    assert tracer.collectives == [
        Collective("all_reduce", "tp", size=1, shape=(3, 2), dtype="float32", nbytes=24),
        Collective("broadcast", "world", size=1, shape=(5,), dtype="int64", nbytes=40),
        Collective("all_gather", "pp", size=1, shape=(4,), dtype="float32", nbytes=16),
        Collective("all_to_all", "cp", size=1, shape=(3, 2), dtype="float32", nbytes=24, kept=24),
    ]
