"""FP8 by Transformer Engine's own Python code: products, sizes and scales, its kernels emulated."""

from __future__ import annotations

from typing import Any

import pytest

from dattn_mcore.config.load import merge
from tests.distributed.small_models import SMALL_MODEL
from tests.te import fp8_jobs

# Blocks of 128 divide it.
SIZES = {"model": merge(SMALL_MODEL, {"llm": {"hidden_size": 128, "ffn_hidden_size": 128}})}
SIZES["model"]["llm"] |= {"head_dim": 64}
SIZES["data"] = {"pad_multiple": 16}  # the same rows without FP8
ALL = sorted(fp8_jobs.LINEARS)


def fp8(recipe: str, **train: Any) -> dict[str, Any]:
    return merge(SIZES, {"train": {"fp8": recipe, **train}})


@pytest.mark.parametrize(
    ("recipe", "settings", "layers"),
    [
        ("delayed", {}, [0, 1, 2, 3]),
        ("tensorwise", {}, [1, 2]),
        ("tensorwise", {"fp8_bf16_layers": 0}, [0, 1, 2, 3]),
        ("blockwise", {}, [1, 2]),
    ],
)
def test_the_decoders_linears_are_in_fp8_save_the_first_and_last_layers(
    any_te, recipe, settings, layers
):
    (plain,) = any_te.run(fp8_jobs.products, 1, SIZES)
    assert plain["forward"] == {} and plain["backward"] == 0
    (found,) = any_te.run(fp8_jobs.products, 1, fp8(recipe, **settings))
    assert sorted(found["forward"]) == layers
    # Of the last layer, whose visual rows end early, the linears are others of the same names.
    assert all(sorted(names) == ALL for names in found["forward"].values())
    assert found["backward"] == 2 * len(ALL) * len(layers)  # of the input and of the weight
    assert found["loss"] != plain["loss"]
    assert found["loss"] == pytest.approx(plain["loss"], rel=0.02)  # three bits of a number


def test_histories_move_and_scales_follow_them(any_te):
    (found,) = any_te.run(fp8_jobs.histories, 1, fp8("delayed"))
    assert found["length"] == 1024
    assert found["newest"][:2] == pytest.approx([found["input"], found["weight"]])
    assert found["scales"][:2] == pytest.approx([448 / found["input"], 448 / found["weight"]])
    assert found["first"][:2] == [0, 0]  # of the next step
    assert found["gradient_scales"][0] == pytest.approx(57344 / found["gradient_newest"][0])
    assert found["gradient_newest"][0] > 0


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
def test_scales_are_updated_as_the_package_does_without_its_kernel(te, algorithm):
    assert te.run(fp8_jobs.updates_agree, 1, algorithm) == [0]


def test_rows_must_be_a_multiple_of_16(any_te):
    """Of 8 in forward, by the package's own check; of 16 where a weight's gradient sums over them."""
    (found,) = any_te.run(fp8_jobs.rows_taken, 1, [12, 24, 32])
    assert found[12] is not None and "8" in found[12]
    assert found[24] == "FP8 product: summed dimension 24 is no multiple of 16"
    assert found[32] is None
