"""A rehearsal predicts what the ranks of a real run exchange: the same list, the same bytes."""

import pytest

from dattn_mcore.config.load import from_dict, merge
from dattn_mcore.training.rehearse import as_rehearsed, pack_of, rehearse
from tests.distributed.rehearsal_jobs import traced_step
from tests.distributed.small_models import GEMMA, SMALL_MODEL

PACKS = [
    (((True, 16), (False, 9)), ((False, 4), (True, 32), (False, 11))),
    (((False, 12),), ((True, 16), (False, 7))),
]
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.mark.parametrize(
    ("world_size", "parallel", "model", "train"),
    [
        (2, {"tp": 2, "sp": True}, {}, {}),
        (2, {"tp": 2}, {}, {"precision": "bf16"}),
        (2, {"pp": 2}, GEMMA, {}),
        (2, {}, {}, {}),
        (2, OVERLAP, {}, {"precision": "bf16"}),
        (2, {"pp": 2, "vpp": 2}, {}, {}),
        (4, {"tp": 2, "sp": True, **OVERLAP}, {}, {"recompute": "full", "trains": ["projector"]}),
        (2, {"cp": 2}, {}, {"recompute": "full"}),
        (4, {"cp": 4}, GEMMA, {"precision": "bf16"}),
        (4, {"cp": 2, "tp": 2, "sp": True}, {}, {}),
        (2, {"tp": 2, "tower": "tiles"}, {}, {}),
        (4, {"cp": 2, "tp": 2, "sp": True, "tower": "tiles"}, {}, {"precision": "bf16"}),
    ],
    ids=[
        "tp2-sp",
        "tp2",
        "pp2-tied",
        "dp2",
        "dp2-overlap",
        "pp2-vpp2",
        "tp2-sp-dp2-overlap",
        "cp2",
        "cp4",
        "cp2-tp2-sp",
        "tp2-tiles",
        "cp2-tp2-sp-tiles",
    ],
)
def test_every_exchange_is_predicted(pool, world_size, parallel, model, train):
    tree = {"model": merge(SMALL_MODEL, model), "parallel": parallel, "train": train}
    config, _ = as_rehearsed(from_dict(tree))
    packs = [pack_of(config, layouts) for layouts in PACKS]
    for rank, traced in enumerate(pool.run(traced_step, world_size, tree, PACKS)):
        predicted = rehearse(config, world_size, rank, packs).collectives
        assert list(predicted) == traced
        assert sum(one.sent for one in traced) > 0
