"""Too little memory in a step: one line with the rank, the pack, and the settings to lower."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from dattn_mcore.config.schema import Config
from dattn_mcore.data.batch import MicroBatch
from dattn_mcore.errors import OutOfMemoryError
from dattn_mcore.models.dattn import ModelInputs
from dattn_mcore.training.last_words import reason_of, this_rank

Item = TypeVar("Item")


class StepMemoryError(Exception):
    """Raised by the step, on the rank whose allocation failed.

    Args:
        pack: number of the micro-batch that was begun last; None: the optimizer's update failed.
        reason: what the library said.
    """

    def __init__(self, pack: int | None, reason: str) -> None:
        super().__init__(pack, reason)
        self.pack, self.reason = pack, reason

    @classmethod
    def of(cls, error: Exception, pack: int | None) -> StepMemoryError:
        """From what a library raised."""
        return cls(pack, reason_of(error))


class Begun(Iterator[Item]):
    """Hands out items and counts them."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = iter(items)
        self.count = 0

    def __next__(self) -> Item:
        item = next(self._items)
        self.count += 1
        return item


def explain_memory(
    error: StepMemoryError,
    step: int,
    micro_batches: list[MicroBatch],
    inputs: list[ModelInputs],
    config: Config,
) -> OutOfMemoryError:
    """The line of the rank that ran out of memory.

    Args:
        error: what the step raised.
        step: 1-based number of the step that was not done.
        micro_batches: this replica's packs.
        inputs: the same on the device, with the rows that padding makes of them.
        config: the run.
    """
    said = f"{this_rank()} is out of memory at step {step}"
    split = "divide the model over more processes (--tp, --pp)"
    if error.pack is None:
        return OutOfMemoryError(
            f"{said}, in the optimizer's update ({error.reason}); {split}, or start more data "
            "parallel ones, which divide the optimizer's state"
        )
    params = inputs[error.pack].params
    data, train = config.data, config.train
    recompute = "" if train.recompute == "full" else "set train.recompute=full, "
    return OutOfMemoryError(
        f"{said}, in pack {error.pack + 1} of {len(inputs)} "
        f"({micro_batches[error.pack].num_samples} samples, {params.num_text} text and "
        f"{params.num_visual} visual rows; {error.reason}); lower data.text_budget="
        f"{data.text_budget}, data.visual_budget={data.visual_budget} or train.loss_chunk="
        f"{train.loss_chunk}, {recompute}or {split}"
    )
