"""Keeps out of a run's output what Megatron-Core announces to those who build on it."""

from __future__ import annotations

import logging

# Loggers of Megatron-Core, and what they warn of in every run; 0.16 says none of it.
ANNOUNCEMENTS = {
    # From 0.19 on: of `common.pt`, which the releases before need.
    "megatron.core.dist_checkpointing.strategies.common": "will be removed in a future release",
    # From 0.17 on: of the writer that comes without another package.
    "megatron.core.dist_checkpointing.strategies.torch": "will be removed in the future releases",
    # From 0.18 on: it computes the layout of the buffers itself, as before.
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
}


def hide() -> None:
    """Does so from now on; calling it again changes nothing."""
    for name in ANNOUNCEMENTS:
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return ANNOUNCEMENTS[record.name] not in record.getMessage()
