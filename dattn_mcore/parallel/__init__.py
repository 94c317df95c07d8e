"""Where the processes are: device platform, process groups, mends for CPU-only machines."""

from dattn_mcore.parallel.groups import single_process

__all__ = ["single_process"]
