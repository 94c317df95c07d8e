"""Vision towers: one module each, with its record as `ARCHITECTURE`."""
