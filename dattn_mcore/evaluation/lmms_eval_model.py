"""The exported model in lmms-eval: `lmms_eval --model dattn_mcore --model_args pretrained=DIR`."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from lmms_eval.api.model import lmms
from PIL import Image
from rich.console import Console

from dattn_mcore.errors import ConfigError
from dattn_mcore.evaluation.by_image import content_key
from dattn_mcore.evaluation.generation import Generator, Request, resolve_device
from dattn_mcore.evaluation.guessing import FEWEST, look_at
from dattn_mcore.evaluation.images import MAX_PIXELS, SEEN
from dattn_mcore.evaluation.lmms_eval_failures import TaskFailures, logger
from dattn_mcore.evaluation.progress import bars
from dattn_mcore.evaluation.questions import mark_images
from dattn_mcore.evaluation.self_check import SelfCheckError
from dattn_mcore.hf.image_rules_dattn import ImageRules, to_rgb
from dattn_mcore.types import IMAGE_MARK

DEFAULT_NEW_TOKENS = 1024  # what lmms-eval's own models take where a task says nothing


class Shown:
    """An image that lmms-eval has decoded, in the form that requests take.

    Args:
        image: of a task's document.
    """

    def __init__(self, image: Image.Image) -> None:
        self.image = image

    @cached_property
    def key(self) -> Hashable:
        """The same for the same image."""
        return content_key(self.image)

    def open(self, who: str, rules: ImageRules = SEEN) -> Image.Image:
        """The image as RGB, by the rules of the model that is shown it."""
        if self.image.width * self.image.height > MAX_PIXELS:
            raise ConfigError(f"{who}: an image has more than {MAX_PIXELS} pixels")
        return to_rgb(self.image, rules)


class DattnMcore(lmms):
    """A simple model of lmms-eval over an exported Hugging Face folder.

    Args:
        pretrained: exported folder.
        batch_size: requests generated at once by each process.
        device: auto, cpu or gpu, or a device as lmms-eval names it.
        dtype: auto (as stored), float32 or bfloat16.
        image_cache_gib: memory for images that are asked about again; 0: none.
        **unknown: anything else is a mistake.

    Raises:
        CheckpointError: the folder cannot be loaded.
        ConfigError: an argument is unknown, or the device is not there.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        image_cache_gib: float | str = 4.0,
        **unknown: Any,
    ) -> None:
        super().__init__()
        # lmms-eval passes these to every model.
        strange = [k for k, v in unknown.items() if v is not None and k != "max_batch_size"]
        if strange:
            raise ConfigError(
                f"--model_args has {strange[0]!r}; known are pretrained, batch_size, device, "
                "dtype, image_cache_gib"
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"--batch_size is {batch_size!r}; it must be a number of 1 or more")
        self.batch_size = int(batch_size)
        self._rank = int(os.environ.get("RANK", "0"))
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        kind = "auto" if device in (None, "") else device if device in ("auto", "cpu") else "gpu"
        local = (int(os.environ.get(n, d)) for n, d in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
        found = resolve_device(kind, *local)
        room = gib_of(image_cache_gib)
        self.generator = Generator(pretrained, found, dtype, image_cache_gib=room)
        self.device = self.generator.device
        self._checked = False
        self._failures = TaskFailures()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers of requests, in their order.

        A task that fails, such as by showing a video file, fails alone: its answers are empty and
        `TaskFailures` takes it out of the scores.

        Args:
            requests: instances whose arguments are (context, settings of generation, function that
                gives a document's images, document's number, task, split).

        Raises:
            ConfigError: every task of the run has failed.
            OutOfMemoryError: the batch does not fit the GPU's memory.
            SystemExit: the model fails its self-check.
        """
        answers: list[str] = [""] * len(requests)
        groups: dict[tuple[str, str], list[int]] = {}
        for number, request in enumerate(requests):
            settings = repr(sorted(request.args[1].items()))
            groups.setdefault((request.task_name, settings), []).append(number)
        self._failures.seen(requests)
        with bars(Console(stderr=True, quiet=self.rank != 0)) as bar:
            progress = bar.add_task("dattn_mcore", total=len(requests))
            for (task, _), numbers in groups.items():
                if task in self._failures.reasons:
                    continue
                try:
                    for number, text in self._group([requests[number] for number in numbers]):
                        answers[numbers[number]] = text
                        bar.advance(progress)
                except torch.OutOfMemoryError:  # the others would fail so too
                    raise
                except Exception as error:  # a task's own functions raise whatever they like
                    self._failures.add(task, error)
        self._end_if_all_failed()
        failed = self._failures.reasons
        answers = [
            "" if request.task_name in failed else answer
            for request, answer in zip(requests, answers, strict=True)
        ]
        self._look_at(requests, answers)
        return answers

    def _look_at(self, requests: Sequence[Any], answers: Sequence[str]) -> None:
        """Says where all answers of a task are empty or the same: lmms-eval scores them all."""
        tasks: dict[str, list[str]] = {}
        for request, answer in zip(requests, answers, strict=True):
            if request.task_name not in self._failures.reasons:
                tasks.setdefault(request.task_name, []).append(answer)
        for task, given in tasks.items():
            for note in look_at(given, [])[0] if len(given) >= FEWEST else ():
                logger.warning("dattn_mcore, %s: %s", task, note)

    def _group(self, requests: Sequence[Any]) -> Iterator[tuple[int, str]]:
        """Numbers and answers of requests that share their settings."""
        wanted = dict(requests[0].args[1])
        until = wanted.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        tokens, more = generation_settings(wanted)
        asked = [self._request(request.args) for request in requests]
        # One with a picture, if there is one: pixels too can get lost on their way.
        self._check(next((request for request in asked if request.pictures), asked[0]))
        for batch in self.generator.generate(asked, self.batch_size, tokens, **more):
            for number, text in batch.items():
                answer = cut(text, until)
                self.cache_hook.add_partial("generate_until", requests[number].args[:2], answer)
                yield number, answer

    def _check(self, first: Request) -> None:
        """Checks the model on the first prompt of all.

        lmms-eval turns every exception into a logged line and exit status 0, but not this one.

        Raises:
            SystemExit: the model says one thing with its cache, and another without.
        """
        if self._checked:
            return
        try:
            self.generator.self_check(first, self.batch_size)
        except SelfCheckError as error:
            raise SystemExit(f"error: {error}") from None
        self._checked = True

    def _request(self, arguments: tuple[Any, ...]) -> Request:
        context, _, images_of, number, task, split = arguments
        images = images_of(self.task_dict[task][split][number]) or []
        who = f"{task}, document {number}"
        if any(not isinstance(image, Image.Image) for image in images):
            raise ConfigError(f"{who}: shows something else than images, which this model cannot")
        if context.count(IMAGE_MARK) not in (0, len(images)):
            context = context.replace(IMAGE_MARK, "")
        pictures: Any = tuple(Shown(image) for image in images)
        return Request(who, mark_images(context, len(images)), pictures)

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Not for this model: such tasks fail, others of the run go on.

        Raises:
            NotImplementedError: the run has no other tasks.
        """
        return self._refuse(requests, "dattn_mcore answers generation tasks; take such a task")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Not for this model: such tasks fail, others of the run go on.

        Raises:
            NotImplementedError: the run has no other tasks.
        """
        return self._refuse(requests, "dattn_mcore answers tasks of one round; take such a task")

    def _refuse(self, requests: Sequence[Any], why: str) -> list[Any]:
        self._failures.seen(requests)
        error = NotImplementedError(why)
        for task in dict.fromkeys(request.task_name for request in requests):
            self._failures.add(task, error)
        if not requests or (self.world_size == 1 and self._all_failed()):
            raise error
        return [""] * len(requests)

    def clean(self) -> None:
        """Called by lmms-eval on every process between answering and scoring.

        Raises:
            ConfigError: every task of the run has failed.
        """
        self._failures.share()
        super().clean()
        if self._all_failed():
            raise ConfigError(self._failures.summary())

    def _all_failed(self) -> bool:
        return bool(self._failures.reasons) and self._failures.reasons.keys() >= set(self.task_dict)

    def _end_if_all_failed(self) -> None:
        """In one process there is nothing to wait for; several end together, in `clean`."""
        if self.world_size == 1 and self._all_failed():
            raise ConfigError(self._failures.summary())


def gib_of(given: float | str) -> float:
    """The size of the image cache, in GiB.

    Raises:
        ConfigError: it is no number of 0 or more.
    """
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"image_cache_gib is {given!r}; it must be a number of GiB, 0 or more")
    return value


def generation_settings(wanted: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """New tokens, and what else `generate` is given, from a task's settings.

    Args:
        wanted: a task's `generation_kwargs` without `until`.
    """
    tokens = int(wanted.get("max_new_tokens") or DEFAULT_NEW_TOKENS)
    heat = float(wanted.get("temperature") or 0.0)
    more: dict[str, Any] = {"num_beams": int(wanted.get("num_beams") or 1)}
    if heat > 0 and wanted.get("do_sample", True):
        more |= {"do_sample": True, "temperature": heat, "top_p": wanted.get("top_p") or 1.0}
    return tokens, more


def cut(text: str, until: Sequence[str]) -> str:
    """An answer up to the first of the strings that end it."""
    for end in until:
        if end:
            text = text.split(end)[0]
    return text.strip()
