"""Megatron-Core checkpoint to Hugging Face folder."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig

import dattn_mcore.hf
from dattn_mcore.architectures.parameters import Entry, Shape, in_order_of_layers
from dattn_mcore.architectures.tables import model_table
from dattn_mcore.checkpoint.mixing import split
from dattn_mcore.data.tokenizer import Tokenizer, load_tokenizer
from dattn_mcore.errors import CheckpointError, DataError
from dattn_mcore.hf import REMOTE_CODE_FILES
from tools.checkpoint_convert.adapted_checkpoint import open_checkpoint
from tools.checkpoint_convert.atomic_folder import AtomicFolder
from tools.checkpoint_convert.configs import TokenIds, to_hf
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint
from tools.checkpoint_convert.following_digest import FollowingDigest
from tools.checkpoint_convert.safetensors_folder import SafetensorsWriter
from tools.checkpoint_convert.tables import check_keys, mcore_shapes
from tools.checkpoint_convert.tokenizers_out import export_processor
from tools.checkpoint_convert.workers import Progress, Report, in_shares, run_shares

THREADS = 2
EMBEDDING = "embedding.word_embeddings.weight"
Step = tuple[Entry, int | None]  # a line of the table and a layer


@dataclass(frozen=True)
class ExportOptions:
    """What a user may choose.

    Attributes:
        tokenizer: SentencePiece file or Hugging Face folder; None: data.tokenizer of the run.
        template: conversation template of the chat template; None: data.template of the run.
        max_shard_bytes: largest safetensors file.
        processes: how many share the work.
        check: load the export and compare it with the trainer before it gets its name.
        ema: export the running mean of the weights.
        base: of a checkpoint of adapters: where the checkpoint of its base is now; None: where it
            was.
    """

    tokenizer: str | None = None
    template: str | None = None
    max_shard_bytes: int = 5_000_000_000
    processes: int = 1
    check: bool = False
    ema: bool = False
    base: str | None = None


@dataclass(frozen=True)
class Exported:
    """What a conversion did.

    Attributes:
        source: the checkpoint that was read.
        checked: what was compared, in one line; empty: nothing.
    """

    source: Path
    checked: str


def convert(
    checkpoint: str | Path,
    output: str | Path,
    options: ExportOptions | None = None,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Writes a Hugging Face folder that loads without this package.

    Args:
        checkpoint: checkpoint or run folder; adapters are added to the weights of their base.
        output: folder to make.
        options: see `ExportOptions`.
        progress: called after every tensor.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model, or cannot be expressed,
            or the output exists.
        SelfCheckError: the export does not say what the trainer says; nothing is left of it.
    """
    options = options or ExportOptions()
    source = open_checkpoint(checkpoint, options.base, ema=options.ema)
    table = model_table(source.config.model)
    check_keys(str(source.path), mcore_shapes(table), source.shapes, source.dtypes)
    data = source.config.data
    tokenizer = find_tokenizer(source, options.tokenizer)
    with AtomicFolder(output) as folder:
        ids = export_processor(
            folder,
            source.config.model,
            data,
            tokenizer,
            options.template or data.template,
        )
        dtype = source.dtypes[EMBEDDING]
        config = to_hf(source.config.model, source.config.attention, ids, dtype)
        config.save_pretrained(folder)
        _generation_config(ids, source.config.model.llm.vocab_size).save_pretrained(folder)
        for name in REMOTE_CODE_FILES:
            shutil.copyfile(Path(dattn_mcore.hf.__path__[0]) / name, folder / name)
        _write_weights(source, table, dtype, folder, options, progress)
        checked = ""
        if options.check:
            # Building the trainer's model costs seconds, which a conversion alone need not pay.
            from tools.checkpoint_convert.export_check import check_export

            checked = check_export(folder, source, str(output))
    return Exported(source.path, checked)


def find_tokenizer(source: DistCheckpoint, given: str | None) -> Tokenizer:
    """The tokenizer that a user names, else the one that the checkpoint was trained with.

    The run's `data.tokenizer` may be relative to the folder that it was started in, and at that
    place there may be another one by now: a checkpoint says where its own was, and its fingerprint.

    Raises:
        CheckpointError: it is not there any more, or is another one.
    """
    named = source.config.data.tokenizer
    places = [given] if given else [source.tokenizer.get("path"), named]
    fingerprint = None if given else source.tokenizer.get("fingerprint")
    problem = ""
    for place in dict.fromkeys(place for place in places if place):
        try:
            tokenizer = load_tokenizer(
                place, "--tokenizer" if given else "data.tokenizer of the run"
            )
        except DataError as error:
            problem = problem or str(error)
            continue
        if fingerprint in (None, tokenizer.fingerprint):
            return tokenizer
        problem = f"{place} is not the tokenizer of the run (its files have changed)"
    way_out = "" if given else "; name the run's tokenizer by --tokenizer"
    raise CheckpointError(f"{problem}{way_out}")


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
    options: ExportOptions,
    progress: Progress,
) -> None:
    """Lays files out layer by layer; in each process `THREADS` tensors are in memory at a time."""
    announced: dict[str, tuple[Shape, torch.dtype]] = {}
    steps = in_order_of_layers(table)
    for entry, layer in steps:
        kind = dtype if entry.key is None else source.dtypes[entry.key]
        for name, shape in zip(entry.names(layer), entry.parts.values(), strict=True):
            announced[name] = (shape, kind)

    def nbytes(step: Step) -> int:
        return sum(
            torch.Size(announced[name][0]).numel() * announced[name][1].itemsize
            for name in step[0].names(step[1])
        )

    def place(step: Step) -> tuple[str, int]:
        entry, layer = step
        return ("", 0) if entry.key is None else source.place(entry.key, layer)

    shares = in_shares(sorted(steps, key=place), options.processes, nbytes)
    names = sorted(source.digests, key=lambda name: source.digests[name][0], reverse=True)
    checked = [names[share :: len(shares)] for share in range(len(shares))]
    total = sum(map(nbytes, steps))

    with SafetensorsWriter(folder, announced, options.max_shard_bytes) as writer:

        def move(step: Step) -> Step:
            entry, layer = step
            if entry.key is None:
                parts = [torch.zeros(shape, dtype=dtype) for shape in entry.parts.values()]
            else:
                parts = split(entry, source.read(entry.key, layer))
            for name, part in zip(entry.names(layer), parts, strict=True):
                writer.add(name, part)
            return step

        def job(share: int, report: Report) -> list[str]:
            digests = {name: source.digests[name] for name in checked[share]}
            written = []
            with (
                FollowingDigest(source.path, digests) as behind,
                ThreadPoolExecutor(THREADS) as threads,
            ):
                try:
                    for step in threads.map(move, shares[share]):
                        written += step[0].names(step[1])
                        behind.follow(*place(step))
                        report(nbytes(step))
                except BaseException:
                    threads.shutdown(cancel_futures=True)
                    raise
                behind.finish()
            return written

        written = run_shares(job, len(shares), total, progress)
        writer.close(name for names in written for name in names)
