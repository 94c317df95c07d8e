"""Where samples come from: LLaVA JSON and JSON lines, tar shards (WebDataset), parquet.

Every format is one class with the interface of `source.SourceFile`; `open_sources` chooses it.
"""
