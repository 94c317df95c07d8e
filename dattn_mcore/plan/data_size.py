"""How many samples and steps a run has, where its data are on this machine."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

from dattn_mcore.config.schema import Config
from dattn_mcore.data.budgets import Fates
from dattn_mcore.data.index.store import Index, open_index
from dattn_mcore.data.run_order import order_of_run
from dattn_mcore.data.steps import steps_of
from dattn_mcore.data.tokenizer import load_tokenizer
from dattn_mcore.errors import DattnError
from dattn_mcore.plan.workload import DataSize


def data_size(config: Config) -> DataSize:
    """Counts as the run does where its index is here, else the records of the annotations."""
    index = _index(config) if config.train.steps is None else None
    if index is None:
        return DataSize(_count_records(config))
    order = order_of_run(config, index)
    steps = steps_of(config, order, Fates(index, config))
    return DataSize(
        order.epoch_size, max(1, steps.up_to(math.ceil(order.epoch_size * config.train.epochs)))
    )


def _index(config: Config) -> Index | None:
    """The index if it is here and fresh; a plan makes none."""
    data = dataclasses.replace(config.data, build_index=False)
    try:
        tokenizer = load_tokenizer(data.tokenizer)
        return open_index(dataclasses.replace(config, data=data), tokenizer)
    except (DattnError, OSError):
        return None


def _count_records(config: Config) -> int | None:
    try:
        records = json.loads(Path(config.data.annotations).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return len(records) if isinstance(records, list) else None
