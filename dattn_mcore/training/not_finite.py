"""A loss or gradient that is not finite: all ranks stop before the update and name the samples."""

from __future__ import annotations

import torch.distributed as dist

from dattn_mcore.data.batch import GlobalBatch
from dattn_mcore.errors import DattnError

NAMED_SAMPLES = 8


class NotFiniteError(Exception):
    """Raised on every rank by the step, before the weights change.

    Args:
        what: loss or gradient norm.
        value: nan or inf.
        packs: this replica's micro-batches whose own loss is not finite, where this rank knows.
    """

    def __init__(self, what: str, value: float, packs: tuple[int, ...] = ()) -> None:
        super().__init__(what, value, packs)
        self.what, self.value, self.packs = what, value, packs


def explain(error: NotFiniteError, step: int, batch: GlobalBatch) -> DattnError:
    """One line that names the samples; called by all ranks, and the same on all.

    Args:
        error: what the step raised.
        step: 1-based number of the step that was not done.
        batch: this rank's part of the step's data.
    """
    mine = [name for pack in error.packs for name in batch.microbatches[pack].sample_ids]
    everyone: list[list[str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    # Each once: a sample is there as often as it has branches, and on every rank of its replica.
    culprits = list(dict.fromkeys(name for names in everyone for name in names or []))
    whose = "micro-batch" if culprits else "step"
    skipped = {sample.id for sample in batch.skipped}
    names = culprits or [name for name in batch.sample_ids if name not in skipped]
    more = f" and {len(names) - NAMED_SAMPLES} more" if len(names) > NAMED_SAMPLES else ""
    return DattnError(
        f"the {error.what} is {error.value} at step {step}, in the {whose} of samples "
        f"{', '.join(names[:NAMED_SAMPLES])}{more}; the weights were not updated and the newest "
        "checkpoint is intact. Look at these samples, lower optim.lr or raise optim.warmup_ratio"
    )
