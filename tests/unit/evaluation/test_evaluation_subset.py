"""A part of the questions: the same one each time, whole groups, the scores of its own rows."""

import random
from collections import Counter

import pytest

from dattn_mcore.errors import ConfigError
from dattn_mcore.evaluation.benchmarks import BY_NAME, Options, make_benchmark
from dattn_mcore.evaluation.subset import Item, subset

SCORED = [name for name, kind in BY_NAME.items() if kind.scores]


def test_all_are_chosen_without_a_limit_and_of_few():
    items = [Item(str(n)) for n in range(5)]
    for limit in (None, 5, 6):
        assert subset(items, limit) == [0, 1, 2, 3, 4]


def test_the_order_of_the_file_chooses_nothing():
    items = [Item(f"q{n}", "abc"[n % 3]) for n in range(90)]
    chosen = {items[place].key for place in subset(items, 17)}
    assert len(chosen) == 17
    assert chosen == {items[place].key for place in subset(items, 17)}
    for category in "abc":  # their order is that of the file, so only within one
        own = [item for item in items if item.category == category]
        random.Random(0).shuffle(own)
        fill = iter(own)
        mixed = [next(fill) if item.category == category else item for item in items]
        assert {mixed[place].key for place in subset(mixed, 17)} == chosen


def test_categories_keep_their_shares():
    items = [Item(str(n), "rare" if n % 10 == 0 else "common") for n in range(400)]
    counts = Counter(items[place].category for place in subset(items, 60))
    assert counts == {"common": 54, "rare": 6}


def test_neighbours_in_turn_do_not_bias_it():
    """Yes and no in turn, as in POPE's files: every other one would be all yes."""
    items = [Item(f"image {n // 2}, question {n % 2}") for n in range(1000)]
    odd = sum(place % 2 for place in subset(items, 500))
    assert 200 < odd < 300  # half of them; 50 more or less are six standard deviations


def test_groups_stay_whole_and_the_limit_holds():
    groups = [group for group, size in enumerate([1, 4, 2, 3, 4, 4, 2] * 5) for _ in range(size)]
    items = [Item(f"{place}", "", group) for place, group in enumerate(groups)]
    sizes = Counter(groups)
    for limit in range(4, len(items)):
        chosen = subset(items, limit)
        counts = Counter(groups[place] for place in chosen)
        assert 0 < len(chosen) <= limit
        assert all(counts[group] == sizes[group] for group in counts)
    assert len(subset(items[1:5], 2)) == 4  # one group at least


@pytest.mark.parametrize("name", SCORED)
def test_a_part_is_scored_as_its_rows_are_in_the_whole(tree, name):
    whole = make_benchmark(name, tree)
    truths = ["Yes", "A", "No", "B", "ball", "yes"]
    answers = [truths[number % len(truths)] for number in range(len(whole.rows))]
    expected = whole.score(answers).outcomes
    for limit in range(1, len(whole.rows)):
        part = make_benchmark(name, tree, Options(limit=limit))
        assert part.rows == [whole.rows[number] for number in part.chosen]
        score = part.score([answers[number] for number in part.chosen])
        assert score.outcomes == [expected[number] for number in part.chosen]
        if len(part.rows) < len(whole.rows):
            asked = f"a part: {len(part.rows)} of {len(whole.rows)} rows are asked"
            assert asked in part.coverage()


def test_questions_that_are_scored_together_are_chosen_together(tree):
    mme = make_benchmark("mme", tree, Options(limit=2))
    assert len(mme.rows) == 2 and len({row.question_id for row in mme.rows}) == 1
    assert make_benchmark("mme", tree, Options(limit=3)).rows == mme.rows
    pope = make_benchmark("pope", tree, Options(limit=1))
    shown = {(row.category, row.pictures[0].name) for row in pope.rows}
    of_it = [
        row
        for row in make_benchmark("pope", tree).rows
        if (row.category, row.pictures[0].name) in shown
    ]
    assert len(shown) == 1 and pope.rows == of_it


def test_problems_that_a_part_leaves_out_do_not_count_as_wrong(tree):
    whole = make_benchmark("scienceqa", tree)
    problems = whole.problems()
    part = make_benchmark("scienceqa", tree, Options(limit=2))
    right = ["ABCDE"[problems[str(row.question_id)]["answer"]] for row in part.rows]
    assert part.score(right).value == 100


def test_labels_by_position_need_all_rows(tree):
    pope = make_benchmark("pope", tree, Options(as_original=True, limit=1))
    with pytest.raises(ConfigError, match="--as-original joins labels by position"):
        pope.labels()
