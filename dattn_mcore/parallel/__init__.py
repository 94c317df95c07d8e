"""Where the processes are: device platform, process groups, mends for CPU-only machines."""
