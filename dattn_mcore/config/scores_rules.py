"""Rules for scores while training; one line per breach."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from dattn_mcore.config.export_rules import as_yaml
from dattn_mcore.config.schema import Config, ScoresConfig

JUDGED = ("llava-bench", "mm-vet")  # by a language model
MOST_PENDING = 2  # checkpoints being scored or waiting for it, beside which training goes on
BY_SERVER = ("vqav2", "vizwiz")  # which alone has their answers


def scores(config: Config) -> Iterator[str]:
    """What is asked, and when."""
    asked, save_interval = config.scores, config.checkpoint.save_interval
    if not asks(config):
        for field in dataclasses.fields(ScoresConfig):
            if (value := getattr(asked, field.name)) != field.default:
                yield (
                    f"scores.{field.name}={as_yaml(value)} has no effect with nothing to ask; give "
                    "scores.benchmarks, or scores.questions"
                )
    for name in dict.fromkeys(asked.benchmarks):
        if name in JUDGED:
            yield (
                f"scores.benchmarks has {name}, which needs a judge; leave it out, and score it "
                "after training (python -m dattn_mcore.evaluation run)"
            )
        if name in BY_SERVER:
            yield (
                f"scores.benchmarks has {name}, which only its server can score; leave it out, and "
                "write a submission after training (python -m dattn_mcore.evaluation run)"
            )
        if asked.benchmarks.count(name) > 1:
            yield f"scores.benchmarks names {name} twice; name it once"
    if asked.questions is None and asked.image_folder is not None and asked.benchmarks:
        yield (
            f"scores.image_folder={asked.image_folder} has no effect without scores.questions; "
            "leave it out"
        )
    interval = asked.interval
    if asks(config) and interval is not None and interval > 0 and interval % save_interval:
        yield (
            f"scores.interval={interval} must be a multiple of checkpoint.save_interval="
            f"{save_interval}: it is checkpoints that answer"
        )


def asks(config: Config) -> bool:
    """Whether checkpoints answer evaluation questions."""
    return bool(config.scores.benchmarks or config.scores.questions is not None)
