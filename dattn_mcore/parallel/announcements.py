"""Keeps out of a run's output what Megatron-Core announces to those who build on it."""

from __future__ import annotations

import logging

# Loggers of megatron-core 0.19, and what they warn of in every run. 0.16 to 0.18 say none of it.
ANNOUNCEMENTS = {
    # `common.pt`, which 0.16 needs; the writer that comes without another package.
    "megatron.core.dist_checkpointing.strategies.common": "will be removed in a future release",
    "megatron.core.dist_checkpointing.strategies.torch": "will be removed in the future releases",
    # It computes the layout of the buffers itself, as before.
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
}


def hide() -> None:
    """Does so from now on; calling it again changes nothing."""
    for name in ANNOUNCEMENTS:
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return ANNOUNCEMENTS[record.name] not in record.getMessage()
