"""Where samples come from: JSON and JSON lines, tar shards (WebDataset), parquet, Arrow.

Every format is one class with the interface of `source.SourceFile`; `open_sources` chooses it.
"""
