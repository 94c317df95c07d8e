"""A run: every process answers its share of every benchmark, rank 0 puts together and scores."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dattn_mcore.console import complain
from dattn_mcore.errors import ConfigError, DataError, DattnError
from dattn_mcore.evaluation.answer_files import AnswerStore
from dattn_mcore.evaluation.benchmarks import Options, make_benchmark
from dattn_mcore.evaluation.benchmarks.base import Benchmark, check_pictures
from dattn_mcore.evaluation.by_image import key_of, share_of_rank
from dattn_mcore.evaluation.failures import reason
from dattn_mcore.evaluation.generation import (
    Generator,
    Request,
    check_model_folder,
    greedy,
    resolve_device,
)
from dattn_mcore.evaluation.processes import Processes
from dattn_mcore.evaluation.progress import RunProgress
from dattn_mcore.evaluation.results import JudgeAnswers, Result, evaluate
from dattn_mcore.evaluation.run_folder import RunFolder, model_fingerprint, versions
from dattn_mcore.evaluation.score_file import earlier_results, write_scores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSettings:
    """What a run is asked for.

    Attributes:
        model: exported Hugging Face folder.
        data: folder that holds the folders of all benchmarks.
        out: the run's folder.
        benchmarks: names, in order.
        batch_size: questions generated at once by each process.
        max_new_tokens: longest answer; None: each benchmark's own.
        device: auto, cpu or gpu.
        dtype: auto (as stored), float32 or bfloat16.
        options: choices about scoring.
        adapter: folder of `peft` that is added to the model; None: none is.
        image_cache_gib: memory for the keys and values of images that are asked about again; 0:
            each question computes its own.
    """

    model: Path
    data: Path
    out: Path
    benchmarks: tuple[str, ...]
    batch_size: int = 16
    max_new_tokens: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    options: Options = Options()
    adapter: Path | None = None
    image_cache_gib: float = 4.0


def run(settings: RunSettings, judge: JudgeAnswers | None = None) -> list[Result]:
    """Answers and scores all benchmarks; what fails is part of the results.

    Returns:
        On rank 0 results in the order of benchmarks, then those that earlier calls left in the
        folder; nothing on the others.

    Raises:
        CheckpointError: the model folder is none, or the model fails its self-check.
        ConfigError: a name is unknown, the device is not there, or its memory is too small.
        DataError: the run's folder belongs to another run.
    """
    benchmarks = [make_benchmark(n, settings.data, settings.options) for n in settings.benchmarks]
    check_model_folder(settings.model)
    processes = Processes()
    device = resolve_device(settings.device, processes.local_rank, processes.local_size)
    folder = RunFolder(settings.out)
    begun = time.time()
    identity = _claim(folder, settings, processes)
    generator = Generator(
        settings.model,
        device,
        settings.dtype,
        settings.adapter,
        image_cache_gib=settings.image_cache_gib,
    )
    checked = _self_check(generator, benchmarks, settings.batch_size)
    if processes.rank == 0:
        complain(f"{checked}")
        folder.settle(identity)
        processes.post("settle", "")
    else:
        processes.wait("settle", 0)
    with RunProgress(processes.rank == 0) as progress:
        shares = [
            Share(benchmark, settings, generator, folder, processes, progress)
            for benchmark in benchmarks
        ]
        words = [share.answer() for share in shares]
        if processes.rank:
            return []
        failures = [share.gather(own) for share, own in zip(shares, words, strict=True)]
    results = []
    for share, failure in zip(shares, failures, strict=True):
        results.append(share.result(failure, generator.model_id, judge))
    about = _about(identity, settings, generator, processes.size, time.time() - begun)
    results += earlier_results(folder.scores, about, list(identity), settings.benchmarks)
    write_scores(folder.scores, about, results)
    return results


def _self_check(generator: Generator, benchmarks: Sequence[Benchmark], batch_size: int) -> str:
    """Checks the model on the first prompt that can be asked, on every process.

    It has a picture, if a benchmark has one: pixels too can get lost on their way.

    Returns:
        What was compared, for the log.

    Raises:
        SelfCheckError: the model says one thing with its cache, and another without.
        ConfigError: even one prompt does not fit the GPU's memory.
    """
    for benchmark in benchmarks:
        try:
            row = next((row for row in benchmark.rows if row.pictures), benchmark.rows[0])
            request = Request(f"{benchmark.title}, the first question", row.text, row.pictures)
            for picture in row.pictures:
                picture.open(request.who)
        except Exception:  # reported with the results of that benchmark
            continue
        try:
            return generator.self_check(request, batch_size)
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"--batch-size {batch_size}: not even {min(batch_size, 2)} prompts fit the GPU's "
                "memory; take a larger GPU, or --dtype bfloat16"
            ) from None
    return "self-check: none, because no benchmark can be asked"


def _claim(folder: RunFolder, settings: RunSettings, processes: Processes) -> dict[str, Any]:
    """Rank 0 takes the run's folder before the slow part; returns what it is taken for."""
    if processes.rank:
        problem = processes.wait("claim", 0)
        if problem:
            raise DataError(problem)
        return {}
    adapter = settings.adapter
    identity = {
        "model": str(settings.model.resolve()),
        "model fingerprint": model_fingerprint(settings.model),
        "dtype": settings.dtype,
        "adapter": None if adapter is None else str(adapter.resolve()),
        "adapter fingerprint": None if adapter is None else model_fingerprint(adapter),
        "limit": settings.options.limit,
    }
    try:
        folder.claim(identity)
    except DattnError as error:
        processes.post("claim", str(error))
        raise
    processes.post("claim", "")
    return identity


class Share:
    """One process's part of one benchmark.

    Args:
        benchmark: whose rows are answered.
        settings: of the run.
        generator: the model.
        folder: of the run.
        processes: this one among all.
        progress: updated after each batch.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        settings: RunSettings,
        generator: Generator,
        folder: RunFolder,
        processes: Processes,
        progress: RunProgress,
    ) -> None:
        self.benchmark, self.settings, self.generator = benchmark, settings, generator
        self.folder, self.processes, self.progress = folder, processes, progress
        self.tokens = settings.max_new_tokens or benchmark.max_new_tokens
        self.before = 0
        self.shown_before = (0, 0)  # hits and misses of the image cache

    @cached_property
    def store(self) -> AnswerStore:
        """The answers; a question file that cannot be read is reported when they are used."""
        metadata = {**greedy(self.tokens), **self.benchmark.asked_with()}
        model_id = self.generator.model_id
        return AnswerStore(self.folder.answers, self.benchmark, model_id, metadata)

    def answer(self) -> str:
        """Answers this process's open rows; returns why it failed, or nothing."""
        try:
            self._answer()
            word = ""
        except Exception as error:  # a defect too: the other benchmarks go on
            word = reason(error, self.folder, self.benchmark.name, self.processes.rank)
        self.processes.post(self.benchmark.name, word)
        return word

    def _answer(self) -> None:
        rows, processes = self.benchmark.rows, self.processes
        done = self.store.read()
        self.before = len(done)
        keys = [key_of(row.pictures) for row in rows]
        share = share_of_rank(keys, processes.rank, processes.size)
        mine = [i for i in share if i not in done]
        check_pictures(self.benchmark, mine)
        self.progress.begin(self.benchmark.name, self.before, len(rows))
        if not mine:
            return
        name = self.benchmark.title
        if (cache := self.generator.image_cache) is not None:
            self.shown_before = (cache.hits, cache.misses)
        requests = [
            Request(f"{name}, question {rows[i].question_id!r}", rows[i].text, rows[i].pictures)
            for i in mine
        ]
        with self.store.open_answers(processes.rank) as answered:
            try:
                for batch in self.generator.generate(
                    requests, self.settings.batch_size, self.tokens
                ):
                    answered.append({mine[i]: text for i, text in batch.items()})
                    self._show(processes.add(self.benchmark.name, len(batch)))
            except torch.OutOfMemoryError:
                raise ConfigError(
                    f"--batch-size {self.settings.batch_size} does not fit the GPU's memory; what "
                    "is answered is kept, run again with a smaller one"
                ) from None

    def _show(self, new: int) -> None:
        total = len(self.benchmark.rows)
        done = min(self.before + new, total)
        self.progress.update(self.benchmark.name, done, total, self._images_held())

    def _images_held(self) -> str:
        """How many of the images shown by this process were in the cache, for the progress."""
        cache = self.generator.image_cache
        if cache is None:
            return ""
        hits, misses = (
            now - before
            for now, before in zip((cache.hits, cache.misses), self.shown_before, strict=True)
        )
        return f"{hits / (hits + misses):.0%} of images cached" if hits + misses else ""

    def gather(self, own: str) -> str:
        """Waits for the other processes; returns why one of them failed, or nothing."""

        def show() -> None:
            if not own:
                self._show(self.processes.add(self.benchmark.name, 0))

        try:
            words = self.processes.collect(self.benchmark.name, own, show)
        except Exception as error:  # as above
            return reason(error, self.folder, self.benchmark.name)
        return next((word for word in words if word), "")

    def result(self, failure: str, model_id: str, judge: JudgeAnswers | None) -> Result:
        """Puts the parts together and scores them."""
        benchmark = self.benchmark
        if failure:
            return Result(benchmark.name, benchmark.title, error=failure)
        try:
            answers = self.store.merge()
            result = evaluate(benchmark, list(answers), self.folder, model_id, judge)
            result.more |= {
                "answers": str(self.store.whole),
                "max_new_tokens": self.tokens,
                "prompt": self.generator.chat_prompt(benchmark.rows[0].text),
            }
        except Exception as error:  # as above
            problem = reason(error, self.folder, benchmark.name)
            return Result(benchmark.name, benchmark.title, error=problem)
        return result


def _about(
    identity: dict[str, Any],
    settings: RunSettings,
    generator: Generator,
    processes: int,
    seconds: float,
) -> dict[str, Any]:
    """What the scores depend on."""
    return {
        **identity,
        "model_id": generator.model_id,
        "data": str(settings.data.resolve()),
        "template": generator.processor.chat_template,
        "decoding": {
            "greedy": True,
            "num_beams": 1,
            "dtype": str(generator.model.dtype).removeprefix("torch."),
            "device": generator.device.type,
            "batch_size": settings.batch_size,
            "processes": processes,
            "image_cache_gib": 0 if generator.image_cache is None else settings.image_cache_gib,
        },
        "options": asdict(settings.options),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 1),
    }
