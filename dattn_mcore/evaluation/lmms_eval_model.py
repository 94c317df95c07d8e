"""The exported model in lmms-eval: `lmms_eval --model dattn_mcore --model_args pretrained=DIR`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from lmms_eval.api.model import lmms
from PIL import Image
from rich.console import Console

from dattn_mcore.errors import ConfigError
from dattn_mcore.evaluation.generation import Generator, Request, resolve_device
from dattn_mcore.evaluation.guessing import FEWEST, look_at
from dattn_mcore.evaluation.images import MAX_PIXELS, SEEN
from dattn_mcore.evaluation.progress import bars
from dattn_mcore.evaluation.questions import IMAGE_MARK, mark_images
from dattn_mcore.evaluation.self_check import SelfCheckError
from dattn_mcore.hf.image_rules_dattn import ImageRules, to_rgb

logger = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 1024  # what lmms-eval's own models take where a task says nothing


class Shown:
    """An image that lmms-eval has decoded, in the form that requests take.

    Args:
        image: of a task's document.
    """

    def __init__(self, image: Image.Image) -> None:
        self.image = image

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
        **unknown: Any,
    ) -> None:
        super().__init__()
        # lmms-eval passes these to every model.
        strange = [k for k, v in unknown.items() if v is not None and k != "max_batch_size"]
        if strange:
            raise ConfigError(
                f"--model_args has {strange[0]!r}; known are pretrained, batch_size, device, dtype"
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"--batch_size is {batch_size!r}; it must be a number of 1 or more")
        self.batch_size = int(batch_size)
        self._rank = int(os.environ.get("RANK", "0"))
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        kind = "auto" if device in (None, "") else device if device in ("auto", "cpu") else "gpu"
        local = (int(os.environ.get(n, d)) for n, d in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
        self.generator = Generator(pretrained, resolve_device(kind, *local), dtype)
        self.device = self.generator.device
        self._checked = False

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers of requests, in their order.

        Args:
            requests: instances whose arguments are (context, settings of generation, function that
                gives a document's images, document's number, task, split).

        Raises:
            ConfigError: a task asks for what cannot be done, such as video files.
            SystemExit: the model fails its self-check.
        """
        answers: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        with bars(Console(stderr=True, quiet=self.rank != 0)) as bar:
            task = bar.add_task("dattn_mcore", total=len(requests))
            for numbers in groups.values():
                for number, text in self._group([requests[number] for number in numbers]):
                    answers[numbers[number]] = text
                    bar.advance(task)
        self._look_at(requests, answers)
        return answers

    def _look_at(self, requests: Sequence[Any], answers: Sequence[str]) -> None:
        """Says where all answers of a task are empty or the same: lmms-eval scores them all."""
        tasks: dict[str, list[str]] = {}
        for request, answer in zip(requests, answers, strict=True):
            tasks.setdefault(str(request.args[4]), []).append(answer)
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
        self._check(asked[0])
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

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not for this model.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("dattn_mcore answers generation tasks; take such a task")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not for this model.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("dattn_mcore answers tasks of one round; take such a task")


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
