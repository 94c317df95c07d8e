"""Rules for scores while training: one line each."""

import typing

import pytest

from dattn_mcore.config.checks import check_config
from dattn_mcore.config.load import load_config
from dattn_mcore.config.scores_rules import BY_SERVER, JUDGED
from dattn_mcore.errors import ConfigError
from dattn_mcore.evaluation.benchmarks import BY_NAME
from dattn_mcore.types import BenchmarkName

ASKS = "scores.questions=questions.jsonl"


def test_the_names_are_the_benchmarks():
    assert list(typing.get_args(BenchmarkName)) == list(BY_NAME)
    assert {name for name, kind in BY_NAME.items() if kind.judged} == set(JUDGED)
    assert {n for n, kind in BY_NAME.items() if not kind.judged and not kind.scores} == set(
        BY_SERVER
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scores.benchmarks=[mmee]"], "'mmee' is unknown; use one of .*; did you mean mme"),
        (["scores.benchmarks=[mm-vet]"], "scores.benchmarks has mm-vet, which needs a judge"),
        (["scores.benchmarks=[vqav2]"], "has vqav2, which only its server can score"),
        (["scores.benchmarks=[pope,mme,pope]"], "names pope twice"),
        (
            [ASKS, "scores.interval=300"],
            "interval=300 must be a multiple of checkpoint.save_interval=200",
        ),
        (["scores.interval=400"], "scores.interval=400 has no effect with nothing to ask"),
        (["scores.wait=true"], "scores.wait=true has no effect with nothing to ask"),
        (["scores.benchmarks=[pope]", "scores.image_folder=x"], "without scores.questions"),
        ([ASKS, "scores.samples=0"], "scores.samples=0 must be greater than 0, or null for all"),
        ([ASKS, "scores.interval=0"], "scores.interval=0 must be greater than 0"),
        ([ASKS, "scores.batch_size=0"], "scores.batch_size=0 must be greater than 0"),
        ([ASKS, "scores.examples=-1"], "scores.examples=-1 must be at least 0"),
        ([ASKS, "scores.device=tpu"], "scores.device='tpu' is unknown"),
    ],
)
def test_one_line_for_each(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_config(load_config(None, overrides))
    assert len(caught.value.mistakes) == 1


def test_what_can_be_asked():
    names = [name for name in BY_NAME if name not in (*JUDGED, *BY_SERVER)]
    assert len(names) == 8
    overrides = [f"scores.benchmarks=[{','.join(names)}]", ASKS, "scores.interval=400"]
    check_config(load_config(None, overrides))
    check_config(load_config(None, [ASKS]))  # after the last step
