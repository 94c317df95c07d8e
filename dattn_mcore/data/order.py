"""The order of samples: a pure function of (seed, position), independent of every layout.

Positions 0, 1, 2, ... run through an endless concatenation of shuffled epochs. Optimizer step k
takes positions k * G .. (k + 1) * G - 1, so a resume needs no state but the step, and a change
of the number of data-parallel ranks changes nothing.
"""

from __future__ import annotations

import numpy as np


def epoch_permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of one epoch, int64 [num_samples].

    The keys are raw PCG64 words, whose stream NumPy keeps for good (that of
    `Generator.permutation` may change between its versions), sorted stably.
    """
    keys = np.random.PCG64([seed, epoch]).random_raw(num_samples)
    return np.argsort(keys, kind="stable")


class SampleOrder:
    """The endless order over `num_samples` samples."""

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError(f"an order needs at least one sample, got {num_samples}")
        self.num_samples = num_samples
        self.seed = seed
        self._epochs: dict[int, np.ndarray] = {}  # the two used last; a batch may span epochs

    def indexes(self, step: int, global_batch_size: int) -> list[int]:
        """Returns the sample indexes of optimizer step `step` (0-based)."""
        start = step * global_batch_size
        return [self._at(position) for position in range(start, start + global_batch_size)]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_samples)
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = epoch_permutation(self.num_samples, self.seed, epoch)
        return int(self._epochs[epoch][offset])
