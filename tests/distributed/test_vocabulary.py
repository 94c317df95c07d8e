"""The chunked loss: equal to float64 cross entropy of whole logits, and never holding them."""

import pytest
import torch

from dattn_mcore.config.load import merge
from tests.distributed.small_models import GEMMA, SMALL_MODEL
from tests.distributed.visual_jobs import most_rows_of_logits, vocabulary_losses


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "capped"])
@pytest.mark.parametrize(
    ("tp", "chunk", "into_main_grad"),
    [(1, 3, True), (1, 1000, False), (2, 1, False), (2, 4, True), (4, 4, True)],
)
def test_equals_cross_entropy_of_whole_logits(pool, tp, chunk, into_main_grad, softcap):
    ranks = pool.run(vocabulary_losses, tp, tp, chunk, softcap, into_main_grad)
    for rank, results in enumerate(ranks):
        for name, (actual, expected) in results.items():
            # fp32 sums of some 50 numbers of size 10
            torch.testing.assert_close(
                actual.double(), expected, atol=2e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
            is_padding = name == "d_weight" and expected.abs().max() == 0
            assert is_padding == (name == "d_weight" and tp == 4 and rank == 3)


@pytest.mark.parametrize("model", [{}, GEMMA], ids=["untied", "tied"])
def test_logits_are_never_whole(pool, model):
    layouts = (((True, 16), (False, 90)),)
    llm = {"vocab_size": 1000}
    for chunk in (8, 1024):
        tree = {
            "model": merge(merge(SMALL_MODEL, model), {"llm": llm}),
            "train": {"loss_chunk": chunk},
        }
        ((rows, supervised),) = pool.run(most_rows_of_logits, 1, tree, layouts)
        assert supervised > 24
        assert rows == min(chunk, supervised)
