"""What the shipped settings must reach, so that a run that learned nothing does not pass for one.

The bounds hold for every seed and device (docs/quickstart.md has the figures). Other settings are
the user's own experiment: no bound is known for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dattn_mcore.config.load import load_config
from dattn_mcore.errors import DattnError
from dattn_mcore.evaluation.exact_match import Tally

LEAST = 0.90  # of the held-out questions, with the shipped settings
MOST_BLIND = 0.30  # with every visual position signal off
MOST_ABOVE_GUESS = 0.05  # of the questions about videos, without time positions
_FREE = ("train.seed", "train.device", "parallel.cp")  # settings that change no bound
BLIND_SETTING = "model.visual_positions"
TIMELESS_SETTING = "model.video.time_positions"


class ExpectationError(DattnError):
    """A finished run whose accuracy is outside of what its settings must give."""


@dataclass(frozen=True)
class Expectation:
    """Accuracies between which a run must end, 0 to 1.

    Attributes:
        least: of a run that must learn.
        most: of a run that cannot know.
        without: what a run that cannot know goes without.
    """

    least: float = 0.0
    most: float = 1.0
    without: str = "visual positions"

    def check(self, overall: Tally) -> None:
        """Compares.

        Raises:
            ExpectationError: the accuracy is outside.
        """
        reached = f"{overall.correct} of {overall.total} held-out questions are right"
        accuracy = f"({overall.accuracy:.1%})"
        if overall.accuracy < self.least:
            raise ExpectationError(
                f"{reached} {accuracy}; the shipped settings must reach {self.least:.0%} with "
                "every seed: training, export or generation is broken here; run make test-all"
            )
        if overall.accuracy > self.most:
            raise ExpectationError(
                f"{reached} {accuracy}; without {self.without} at most {self.most:.0%} can be: "
                "they reach the model some other way; run make test-all"
            )


def expectation(overrides: Sequence[str]) -> Expectation:
    """The bounds for settings `section.key=value` on top of the shipped ones.

    Raises:
        ConfigError: a setting is unknown or has no valid value.
    """
    changed = {override.partition("=")[0] for override in overrides} - set(_FREE)
    if not changed:
        return Expectation(least=LEAST)
    blind = not load_config(None, list(overrides)).model.visual_positions
    if changed == {BLIND_SETTING}:
        return Expectation(most=MOST_BLIND) if blind else Expectation(least=LEAST)
    return Expectation()


def video_expectation(overrides: Sequence[str], guess: float) -> Expectation:
    """The bounds of the questions about videos.

    Args:
        overrides: settings `section.key=value` on top of the shipped ones.
        guess: accuracy of the best guess that knows what was shown and not when, 0 to 1.
    """
    changed = dict(override.split("=", 1) for override in overrides)
    free = {name for name in changed if name in _FREE}
    if set(changed) == free:
        return Expectation(least=LEAST)
    if set(changed) - free == {TIMELESS_SETTING}:
        if changed[TIMELESS_SETTING].lower() == "false":
            return Expectation(most=guess + MOST_ABOVE_GUESS, without="time positions")
        return Expectation(least=LEAST)
    return Expectation()
