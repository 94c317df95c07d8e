"""The order of samples: a pure function of (seed, position), independent of every layout.

Positions 0, 1, 2, ... run through an endless concatenation of epochs, which `steps` cuts into
optimizer steps. So the state of a run's data is the step's number, the seed and the index's
fingerprint, and a change of the number of data-parallel ranks changes nothing.

An epoch takes `weight` times as many samples of each source as the source has, from the source's
own endless order, and shuffles them together: with weight 0.5 two epochs see every sample once,
with weight 2 one epoch sees every sample twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def epoch_permutation(num_samples: int, seed: int, epoch: int, source: int = 0) -> np.ndarray:
    """Returns the order of one epoch, int64 [num_samples].

    The keys are raw PCG64 words, whose stream NumPy keeps for good (that of
    `Generator.permutation` may change between its versions), sorted stably.
    """
    # NumPy pads a seed with zeros, so that [seed, epoch] and [seed, epoch, 0] are one.
    keys = np.random.PCG64([seed, epoch, source]).random_raw(num_samples)
    return np.argsort(keys, kind="stable")


@dataclass(frozen=True)
class Share:
    """What an epoch takes of one source.

    Attributes:
        numbers: int64, the sample numbers that can be used, ascending.
        weight: How often an epoch sees each of them.
    """

    numbers: np.ndarray
    weight: float = 1.0

    @property
    def per_epoch(self) -> int:
        """Positions of an epoch that belong to this source."""
        return round(len(self.numbers) * self.weight)


class SampleOrder:
    """The endless order over the samples of one or more sources."""

    def __init__(self, shares: Sequence[Share], seed: int) -> None:
        self.epoch_size = sum(share.per_epoch for share in shares)
        if self.epoch_size < 1:
            raise ValueError(f"an order needs at least one sample, got {self.epoch_size}")
        self.seed = seed
        self._shares = tuple(shares)
        self._epochs: dict[int, np.ndarray] = {}  # the two used last; a batch may span epochs

    def numbers(self, start: int, end: int) -> list[int]:
        """Returns the sample numbers at positions `start` to `end` - 1."""
        return [self._at(position) for position in range(start, end)]

    def epoch(self, epoch: int) -> np.ndarray:
        """Returns the sample numbers of an epoch, in order."""
        taken = [self._taken(source, epoch) for source in range(len(self._shares))]
        chosen = np.concatenate(taken)
        return chosen[epoch_permutation(len(chosen), self.seed, epoch)]

    def _taken(self, source: int, epoch: int) -> np.ndarray:
        """What an epoch takes of a source, ascending."""
        share = self._shares[source]
        size, count = len(share.numbers), share.per_epoch
        if count == size:
            return share.numbers
        start, parts = epoch * count, []
        while count:
            around, offset = divmod(start, size)
            part = epoch_permutation(size, self.seed, around, source + 1)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.sort(share.numbers[np.concatenate(parts)]) if parts else share.numbers[:0]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.epoch_size)
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = self.epoch(epoch)
        return int(self._epochs[epoch][offset])
