"""Rules for the held-out loss; one line per breach."""

from __future__ import annotations

from collections.abc import Iterator

from dattn_mcore.config.schema import Config


def held_out(config: Config) -> Iterator[str]:
    """Where held-out samples come from, and that there are some."""
    validation = config.validation
    share = f"validation.share={validation.share:g}"
    if not 0 <= validation.share < 1:
        yield f"{share} must be at least 0 (nothing is held out) and less than 1"
    if validation.share and validation.sources:
        yield f"{share} cannot go with validation.sources; use one of the two"
    if not validation.share and not validation.sources:
        for name in ("interval", "samples"):
            if (value := getattr(validation, name)) is not None:
                yield (
                    f"validation.{name}={value} has no effect without held-out samples; give "
                    "validation.sources, or validation.share"
                )
    names = {source.annotations for source in config.data.sources} or {config.data.annotations}
    for number, source in enumerate(validation.sources):
        if not source.annotations:
            yield f"validation.sources[{number}].annotations is empty; give a file or a pattern"
        if source.weight != 1:
            yield (
                f"validation.sources[{number}].weight={source.weight:g} has no effect: every "
                "held-out sample counts once; leave it out"
            )
        if source.annotations in names:
            yield (
                f"validation.sources[{number}].annotations={source.annotations} is trained on too; "
                "give another file, or use validation.share"
            )


def validates(config: Config) -> bool:
    """Whether the run has held-out samples."""
    return bool(config.validation.share or config.validation.sources)
