"""The held-out samples of a run, in packed micro-batches: the same ones in every pass."""

from __future__ import annotations

import logging

import numpy as np

from dattn_mcore.config.schema import Config
from dattn_mcore.data.batch import GlobalBatch
from dattn_mcore.data.batches import BatchBuilder
from dattn_mcore.data.failures import check_share
from dattn_mcore.data.held_out import check_apart, named_as_validation, validation_config
from dattn_mcore.data.index.layout import digest
from dattn_mcore.data.index.store import Index, open_index
from dattn_mcore.data.order import epoch_permutation
from dattn_mcore.data.pipeline import DataPipeline
from dattn_mcore.data.prefetch import Prefetcher
from dattn_mcore.data.tokenizer import Tokenizer
from dattn_mcore.errors import DataError

_LOG = logging.getLogger(__name__)


class ValidationData:
    """Global batches of a pass over the held-out samples, of one data-parallel rank.

    Args:
        config: The run, checked; it has `validation.sources` or `validation.share`.
        tokenizer: Of the run.
        training: The training data, opened.

    Attributes:
        numbers: Samples of a pass, in order.
        fingerprint: Of these samples: losses of another one are of other samples.
        groups: (source, kind) of each group of samples (`batches.groups_of`).

    Raises:
        DataError: A source cannot be used, holds nothing to predict, or shares samples with
            training.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, training: DataPipeline) -> None:
        self._size = config.train.global_batch_size
        if training.held_out is not None:
            index, chosen = training.index, training.held_out.validated
        else:
            index = _own_index(config, tokenizer)
            chosen = np.asarray(index.usable) == 1
            check_apart(training.index, training.drawn, index, chosen)
        self._batches = BatchBuilder(config, index, tokenizer, training.share, by_group=True)
        self.groups = self._batches.groups
        fits = chosen & ~self._batches.fates.left_out & (index.samples["supervised"] > 0)
        numbers = np.flatnonzero(fits)
        if not len(numbers):
            raise DataError(
                f"validation: of {int(chosen.sum()):,} samples none has text to predict and fits "
                f"data.text_budget={config.data.text_budget} and data.visual_budget="
                f"{config.data.visual_budget}; raise them, or give other samples"
            )
        if left_out := int(chosen.sum()) - len(numbers):
            _LOG.warning(
                "%d of %d held-out samples are over budget or have nothing to predict, and are "
                "left out of the held-out loss",
                left_out,
                int(chosen.sum()),
            )
        most = config.validation.samples
        if most is not None and most < len(numbers):
            numbers = np.sort(numbers[epoch_permutation(len(numbers), 0, 0)[:most]])
        self.numbers: list[int] = numbers.tolist()
        self.fingerprint = digest({"content": index.content["content"], "numbers": self.numbers})
        self._prefetcher = Prefetcher(self._build, config.data.prefetch)

    @property
    def num_batches(self) -> int:
        """Global batches of a pass."""
        return -(-len(self.numbers) // self._size)

    def batch(self, number: int) -> GlobalBatch:
        """A batch of the pass (0-based); in order they are prepared ahead."""
        return self._prefetcher.get(number)

    def end_pass(self) -> None:
        """Ends the thread that prepares batches, until the next pass."""
        self._prefetcher.close()

    def close(self) -> None:
        """Ends the threads."""
        self._prefetcher.close()
        self._batches.close()

    def _build(self, number: int) -> GlobalBatch:
        if number >= self.num_batches:
            raise IndexError(number)  # nobody asks for it: the pass ends before
        return self._batches.build(number, self.numbers[number * self._size :][: self._size])


def _own_index(config: Config, tokenizer: Tokenizer) -> Index:
    """The index of `validation.sources`."""
    with named_as_validation():
        index = open_index(validation_config(config), tokenizer)
    try:
        check_share(index, config.data.max_bad_share)
    except DataError as error:
        raise DataError(f"validation.sources: {error}") from None
    return index
