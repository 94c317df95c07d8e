"""Stands in for Transformer Engine where there is no GPU: same constructors, plain arithmetic.

The signatures are those of transformer-engine 2.8's documentation, as far as Megatron-Core 0.16.1
uses them; an argument that is not among them is a TypeError here as it is there. With this folder
on PYTHONPATH Megatron-Core's real wrappers are built on it.
"""

from . import common, pytorch  # noqa: F401

__version__ = "2.8.0"
