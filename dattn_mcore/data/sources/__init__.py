"""Where samples come from: JSON and JSON lines, tar shards (WebDataset), parquet, Arrow.

Every kind of file is one class with the interface of `source.SourceFile`, every form of record a
module of `records`; `configured.py` chooses both.
"""
