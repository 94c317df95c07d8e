"""Features times layouts: every pair has a case or a reason, and docs/testing.md shows which."""

import pytest

from dattn_mcore.config.checks import check_config
from dattn_mcore.config.load import from_dict, merge
from dattn_mcore.errors import ConfigError
from tests.distributed import feature_table
from tests.distributed.features import (
    CASES,
    EXCLUDED,
    FACTORS,
    POINTLESS,
    REFUSED,
    REQUIRED,
    USUAL,
    case_id,
    processes,
    settings_of,
)
from tests.distributed.small_models import SMALL_MODEL
from tests.pairwise import all_pairs, pairs_of


def checked(case):
    check_config(from_dict(merge({"model": SMALL_MODEL}, settings_of(case))))


def test_every_pair_has_a_case_or_a_reason():
    covered = set().union(*map(pairs_of, CASES))
    missing = set(all_pairs({name: tuple(values) for name, values in FACTORS.items()})) - covered
    assert missing == set(EXCLUDED)
    assert all(reason in (REFUSED, POINTLESS) for reason in EXCLUDED.values())
    for settings in REQUIRED:
        assert any(settings.items() <= case.items() for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_case_is_what_its_name_says(case):
    checked(case)
    parallel = settings_of(case).get("parallel", {})
    sizes = parallel.get("tp", 1) * parallel.get("pp", 1) * parallel.get("cp", 1)
    assert processes(case) == sizes * (2 if case["data"] == "dp2" else 1) <= 8


@pytest.mark.parametrize(
    "pair",
    [pair for pair, reason in EXCLUDED.items() if reason == REFUSED],
    ids=lambda pair: str(sorted(pair)),
)
def test_what_is_called_refused_is_refused(pair):
    with pytest.raises(ConfigError):
        checked({**USUAL, "data": "dp2", **dict(pair)})


def test_every_setting_has_a_case_or_a_reason():
    """A new one too: give it a factor in `features.py`, or say in the table why it has none."""
    assert feature_table.settings_without_a_case() == set(feature_table.ELSEWHERE)


def test_the_page_shows_what_is_run():
    """If not: python -m tests.distributed.feature_table."""
    text = feature_table.PAGE.read_text(encoding="utf-8")
    assert text == feature_table.page(text)
    for feature in feature_table.features():
        for layout in feature_table.layouts():
            assert feature_table.cell(feature, layout).strip("()"), (feature, layout)
