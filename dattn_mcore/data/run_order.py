"""The order of a run's samples, as its settings want it."""

from __future__ import annotations

from collections.abc import Sequence

from dattn_mcore.config.schema import Config
from dattn_mcore.data.grouped_order import GroupedOrder
from dattn_mcore.data.held_out import training_shares
from dattn_mcore.data.image_sets import image_sets
from dattn_mcore.data.index.store import Index
from dattn_mcore.data.order import SampleOrder, Share


def order_of_run(
    config: Config, index: Index, shares: Sequence[Share] | None = None
) -> SampleOrder:
    """The endless order over an index.

    Args:
        config: The run.
        index: Of its data.
        shares: What an epoch takes of each source; None: as `training_shares` has it.

    Raises:
        DataError: An epoch takes nothing.
    """
    shares = training_shares(index, config) if shares is None else shares
    if not config.data.group_images:
        return SampleOrder(shares, config.train.seed)
    # Full packs end a step where they are full, which the order cannot know.
    step = config.train.global_batch_size if config.data.step_packs_multiple is None else None
    return GroupedOrder(shares, config.train.seed, image_sets(index), step)
