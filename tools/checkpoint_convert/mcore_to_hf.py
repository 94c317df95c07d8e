"""Megatron-Core checkpoint to Hugging Face folder."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig

import dattn_mcore.hf
from dattn_mcore.hf import REMOTE_CODE_FILES
from tools.checkpoint_convert.configs import TokenIds, to_hf
from tools.checkpoint_convert.dist_checkpoint import AtomicFolder, DistCheckpoint
from tools.checkpoint_convert.mapping import Entry, Shape, in_order_of_layers
from tools.checkpoint_convert.safetensors_folder import SafetensorsWriter
from tools.checkpoint_convert.tables import check_keys, mcore_shapes, model_table
from tools.checkpoint_convert.tokenizers_out import export_processor

Progress = Callable[[int, int], None]  # bytes done, bytes in all
THREADS = 2
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class ExportOptions:
    """What a user may choose.

    Attributes:
        tokenizer: SentencePiece file or Hugging Face folder; None: data.tokenizer of the run.
        template: conversation template of the chat template; None: data.template of the run.
        max_shard_bytes: largest safetensors file.
    """

    tokenizer: str | None = None
    template: str | None = None
    max_shard_bytes: int = 5_000_000_000


def convert(
    checkpoint: str | Path,
    output: str | Path,
    options: ExportOptions | None = None,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Writes a Hugging Face folder that loads without this package.

    Args:
        checkpoint: checkpoint or run folder.
        output: folder to make.
        options: see `ExportOptions`.
        progress: called after every tensor.

    Returns:
        The checkpoint that was read.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model, or cannot be expressed,
            or the output exists.
    """
    options = options or ExportOptions()
    source = DistCheckpoint(checkpoint)
    table = model_table(source.config.model)
    check_keys(str(source.path), mcore_shapes(table), source.shapes, source.dtypes)
    data = source.config.data
    with AtomicFolder(output) as folder, ThreadPoolExecutor(1) as beside:
        ids = export_processor(
            folder,
            source.config.model,
            data,
            options.tokenizer or data.tokenizer,
            options.template or data.template,
        )
        dtype = source.dtypes[EMBEDDING]
        config = to_hf(source.config.model, source.config.attention, ids, dtype)
        config.save_pretrained(folder)
        _generation_config(ids, source.config.model.llm.vocab_size).save_pretrained(folder)
        for name in REMOTE_CODE_FILES:
            shutil.copyfile(Path(dattn_mcore.hf.__path__[0]) / name, folder / name)
        stop = threading.Event()
        digests = beside.submit(source.check_digests, stop)
        try:
            _write_weights(source, table, dtype, folder, options.max_shard_bytes, progress)
        except BaseException:
            stop.set()
            raise
        digests.result()
    return source.path


def _generation_config(ids: TokenIds, vocab_size: int) -> GenerationConfig:
    """Greedy by default; every stop token; an image is never generated."""
    config = GenerationConfig(
        bos_token_id=ids.bos,
        eos_token_id=list(ids.stop),
        pad_token_id=ids.pad,
        do_sample=False,
    )
    if ids.image < vocab_size:
        config.suppress_tokens = [ids.image]
    return config


def _write_weights(
    source: DistCheckpoint,
    table: list[Entry],
    dtype: torch.dtype,
    folder: Path,
    max_shard_bytes: int,
    progress: Progress,
) -> None:
    """Lays files out layer by layer; `THREADS` tensors are in memory at a time."""
    announced: dict[str, tuple[Shape, torch.dtype]] = {}
    steps = in_order_of_layers(table)
    for entry, layer in steps:
        kind = dtype if entry.key is None else source.dtypes[entry.key]
        for name, shape in zip(entry.names(layer), entry.parts.values(), strict=True):
            announced[name] = (shape, kind)
    total = sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in announced.values())

    def move(step: tuple[Entry, int | None]) -> int:
        entry, layer = step
        if entry.key is None:
            parts = [torch.zeros(shape, dtype=dtype) for shape in entry.parts.values()]
        else:
            parts = entry.mix.split(source.read(entry.key, layer))
        for name, part in zip(entry.names(layer), parts, strict=True):
            writer.add(name, part)
        return sum(part.nbytes for part in parts)

    def place(step: tuple[Entry, int | None]) -> tuple[str, int]:
        entry, layer = step
        return ("", 0) if entry.key is None else source.place(entry.key, layer)

    done = 0
    with (
        SafetensorsWriter(folder, announced, max_shard_bytes) as writer,
        ThreadPoolExecutor(THREADS) as threads,
    ):
        try:
            # In the order of the files, as the check of the digests that runs beside reads them.
            for moved in threads.map(move, sorted(steps, key=place)):
                done += moved
                progress(done, total)
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
        writer.close()
