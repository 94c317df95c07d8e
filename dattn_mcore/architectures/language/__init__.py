"""Families of language models: one module each, with its record as `ARCHITECTURE`."""
