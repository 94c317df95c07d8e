"""What is refused of `checkpoint` and of the running mean of the weights, each in one line."""

import pytest

from dattn_mcore.config import checkpoint_rules, metric_names
from dattn_mcore.config.checks import check_config
from dattn_mcore.config.load import from_dict, load_config
from dattn_mcore.errors import ConfigError


def mistake(*overrides):
    with pytest.raises(ConfigError) as caught:
        check_config(load_config(None, list(overrides)))
    (line,) = caught.value.mistakes
    return line


@pytest.fixture
def computed(monkeypatch):
    """A run that computes two metrics and those of a pattern."""

    def known(config):
        return ("validation/loss", "scores/digits", "validation/loss/*")

    for module in (metric_names, checkpoint_rules):
        monkeypatch.setattr(module, "known_metrics", known)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["checkpoint.keep_every=300"],
            "checkpoint.keep_every=300 must be a multiple of checkpoint.save_interval=200: no "
            "other step is saved",
        ),
        (["checkpoint.keep_best=-1"], "checkpoint.keep_best=-1 must be at least 0 (0: none)"),
        (
            ["checkpoint.keep_every=0"],
            "checkpoint.keep_every=0 must be greater than 0, or null for none",
        ),
        (
            ["checkpoint.keep_best=2"],
            "checkpoint.keep_best=2 needs checkpoint.best_by, the metric that says which are best; "
            "this run computes none: ask for validation or scores",
        ),
        (
            ["checkpoint.keep_best=2", "checkpoint.best_by=validation/loss"],
            "checkpoint.best_by='validation/loss' is a metric that nothing in this run computes; "
            "this run computes none: ask for validation or scores",
        ),
        (
            ["checkpoint.best_mode=least"],
            "checkpoint.best_mode='least' is unknown; use one of auto, min, max",
        ),
        (
            ["train.ema_decay=1"],
            "train.ema_decay=1.0 must be at least 0 and less than 1, or null for none",
        ),
        (["train.ema_start=10"], "train.ema_start=10 needs train.ema_decay, for example 0.999"),
        (
            ["train.ema_start=-1", "train.ema_decay=0.9"],
            "train.ema_start=-1 must be at least 0 (0: from the first step)",
        ),
    ],
)
def test_one_clear_line(overrides, line):
    assert mistake(*overrides) == line


@pytest.mark.parametrize(
    ("best_by", "line"),
    [
        (
            "validation/los",
            "checkpoint.best_by='validation/los' is a metric that nothing in this run computes; "
            "this run computes validation/loss, scores/digits, validation/loss/*; did you mean "
            "validation/loss?",
        ),
        (
            "x" * 300,
            f"checkpoint.best_by='{'x' * 100}' is a metric that nothing in this run computes; "
            "this run computes validation/loss, scores/digits, validation/loss/*",
        ),
    ],
)
def test_a_metric_that_nobody_computes(computed, best_by, line):
    assert mistake("checkpoint.keep_best=1", f"checkpoint.best_by={best_by}") == line


def test_what_a_run_computes():
    scores = {"benchmarks": ["pope", "mme"], "questions": "own.jsonl"}
    config = from_dict({"scores": scores, "validation": {"share": 0.1}})
    own = ("scores/pope", "scores/mme", "scores/questions")
    assert metric_names.known_metrics(config) == ("validation/loss", *own)
    assert metric_names.known_metrics(from_dict({})) == ()


def test_a_metric_that_is_computed(computed):
    for name in ("validation/loss", "scores/digits", "validation/loss/vqa"):
        said = [f"checkpoint.best_by={name}", "checkpoint.keep_best=1", "checkpoint.keep_every=400"]
        check_config(load_config(None, said))
    assert mistake("checkpoint.best_by=scores/digits") == (
        "checkpoint.best_by='scores/digits' needs checkpoint.keep_best of at least 1; or set it to "
        "null"
    )
