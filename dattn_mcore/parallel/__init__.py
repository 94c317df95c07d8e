"""Where the processes are: device platform, process groups, fixes for CPU-only machines."""
