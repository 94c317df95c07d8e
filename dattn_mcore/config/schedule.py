"""The learning rate over the steps of a run: settings in steps, and what is wrong with them.

The curves are Megatron-Core's (`training.schedule`). Where nothing else is set, lengths depend on
the run's; in steps they do not, and a run can go on with more of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dattn_mcore.config.schema import Config, OptimConfig
from dattn_mcore.errors import ConfigError

WARMUP_RATIO = 0.05  # where neither a ratio nor steps are set
_ENDLESS = 2**62  # steps; no run has so many


@dataclass(frozen=True)
class Schedule:
    """When the rate rises and falls, in optimizer steps counted from 1.

    Attributes:
        warmup: steps of the linear warm-up; the last of them has the peak.
        end: first step that would have the minimum; of a schedule without a decay, none.
        final_decay: of `wsd`: steps from the last one at the peak to `end`; 0: no decay.
    """

    warmup: int
    end: int
    final_decay: int = 0

    @property
    def falls_from(self) -> int:
        """Of `wsd`: first step below the peak."""
        return self.end - self.final_decay + 1


def peak_ratio(optim: OptimConfig) -> float:
    """The least learning rate, relative to the peak; the same for every group."""
    return optim.min_lr_ratio if optim.min_lr is None else optim.min_lr / optim.lr


def decays(optim: OptimConfig) -> bool:
    """Whether the schedule has an end, where the rate is least."""
    if optim.schedule == "wsd":
        return bool(optim.decay_steps)
    return optim.schedule in ("cosine", "linear")


def schedule_of(optim: OptimConfig, total_steps: int) -> Schedule:
    """The schedule of a run.

    Args:
        optim: checked on its own (`mistakes`).
        total_steps: of the run.

    Raises:
        ConfigError: warm-up and decay do not fit into the run.
    """
    length = optim.decay_steps if optim.decay_steps and optim.schedule != "wsd" else total_steps
    if optim.warmup_steps is None:
        ratio = WARMUP_RATIO if optim.warmup_ratio is None else optim.warmup_ratio
        warmup = min(max(round(ratio * length), 1), length)
    else:
        warmup = max(optim.warmup_steps, 1)
    if optim.schedule == "wsd" and optim.decay_steps:
        if warmup + optim.decay_steps > total_steps:
            raise ConfigError(
                f"optim.decay_steps={optim.decay_steps} after a warm-up of {warmup} steps needs a "
                f"longer run than {total_steps} steps; set a smaller optim.decay_steps or a larger "
                "train.steps"
            )
        return Schedule(warmup, total_steps + 1, optim.decay_steps + 1)
    if not decays(optim):
        return Schedule(warmup, _ENDLESS)
    if warmup > length:
        of = "optim.decay_steps" if optim.decay_steps else "the run's steps"
        raise ConfigError(
            f"optim.warmup_steps={warmup} is more than {of} ({length}); set a smaller one"
        )
    if length < total_steps and peak_ratio(optim) == 0:
        raise ConfigError(
            f"optim.decay_steps={length} ends with a learning rate of 0 before the run's "
            f"{total_steps} steps do; set a larger one, optim.min_lr or a smaller train.steps"
        )
    return Schedule(warmup, length + 1)


def mistakes(config: Config) -> Iterator[str]:
    """One line for each rule that the settings of the schedule break."""
    optim = config.optim
    if optim.warmup_steps is not None and optim.warmup_ratio is not None:
        yield (
            f"optim.warmup_steps={optim.warmup_steps} and optim.warmup_ratio={optim.warmup_ratio} "
            "both say how long the warm-up is; set one of them to null"
        )
    if optim.min_lr is not None and optim.min_lr_ratio:
        yield (
            f"optim.min_lr={optim.min_lr} and optim.min_lr_ratio={optim.min_lr_ratio} both say "
            "what the least learning rate is; set optim.min_lr=null or optim.min_lr_ratio=0"
        )
    if optim.min_lr is not None and optim.min_lr > optim.lr:
        yield f"optim.min_lr={optim.min_lr} must be at most optim.lr={optim.lr}"
    if optim.decay_steps and optim.schedule in ("constant", "inverse_square_root"):
        yield (
            f"optim.decay_steps={optim.decay_steps} has no effect with optim.schedule="
            f"{optim.schedule}, which has no end; set it to null, or use linear, cosine or wsd"
        )
    if optim.decay_steps == 0 and optim.schedule != "wsd":
        yield (
            f"optim.decay_steps=0 means no decay with optim.schedule=wsd only, not with "
            f"{optim.schedule}; set it to null (the run's steps), or use optim.schedule=constant"
        )
    if optim.schedule == "constant" and (optim.min_lr or optim.min_lr_ratio):
        yield (
            "optim.schedule=constant has no least learning rate; set optim.min_lr=null and "
            "optim.min_lr_ratio=0"
        )
    if optim.wsd_decay != OptimConfig.wsd_decay and optim.schedule != "wsd":
        yield (
            f"optim.wsd_decay={optim.wsd_decay} has no effect with optim.schedule="
            f"{optim.schedule}; leave it out"
        )


def lengths(config: Config) -> Iterator[str]:
    """What does not fit into a run whose steps are known before its data are opened."""
    if config.train.steps is not None and not list(mistakes(config)):
        try:
            schedule_of(config.optim, config.train.steps)
        except ConfigError as error:
            yield from error.mistakes
