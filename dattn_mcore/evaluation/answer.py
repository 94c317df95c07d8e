"""Answers a question file with a Hugging Face model."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dattn_mcore.evaluation.generation import Generator, Request, greedy, resolve_device
from dattn_mcore.evaluation.images import Picture, check_images
from dattn_mcore.evaluation.questions import Answer, Question

Progress = Callable[[int, int], None]  # questions answered, questions in all


@dataclass(frozen=True)
class Settings:
    """How answers are generated.

    Attributes:
        batch_size: questions generated at once.
        max_new_tokens: longest answer.
        device: auto, cpu or gpu.
        adapter: folder of `peft` that is added to the model; None: none is.
        image_cache_gib: memory for the keys and values of images that are asked about again; 0:
            each question computes its own.
    """

    batch_size: int = 32
    max_new_tokens: int = 128
    device: str = "auto"
    adapter: Path | None = None
    image_cache_gib: float = 4.0


class Answerer:
    """A model that answers question files.

    Args:
        folder: exported folder.
        settings: see `Settings`.

    Raises:
        CheckpointError: the folder cannot be loaded.
        ConfigError: the device is not there.
    """

    def __init__(self, folder: str | Path, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.generator = Generator(
            folder,
            resolve_device(self.settings.device),
            adapter=self.settings.adapter,
            image_cache_gib=self.settings.image_cache_gib,
        )
        self.processor = self.generator.processor
        self.model_id = self.generator.model_id

    def answer(
        self,
        questions: Sequence[Question],
        image_folder: str | Path,
        progress: Progress = lambda done, total: None,
        checked: Callable[[str], object] = lambda line: None,
    ) -> list[Answer]:
        """Answers all questions, in their order, after a self-check on the first.

        Args:
            questions: to answer.
            image_folder: that image paths start in.
            progress: called after every batch.
            checked: called with what the self-check compared.

        Raises:
            DataError: an image is missing, damaged or outside the folder.
            SelfCheckError: the model says one thing with its cache, and another without.
        """
        pairs = [(_who(q), image) for q in questions for image in q.images]
        root = check_images(image_folder, pairs)
        requests = [
            Request(_who(q), q.marked_text, tuple(Picture(i, root / i) for i in q.images))
            for q in questions
        ]
        if requests:
            # One with a picture, if there is one: pixels too can get lost on their way.
            first = next((request for request in requests if request.pictures), requests[0])
            checked(self.generator.self_check(first, self.settings.batch_size))
        limit = self.settings.max_new_tokens
        texts: dict[int, str] = {}
        for batch in self.generator.generate(requests, self.settings.batch_size, limit):
            texts |= batch
            progress(len(texts), len(questions))
        return [
            Answer(
                question_id=question.question_id,
                prompt=question.text,
                text=texts[i],
                answer_id=str(uuid.uuid5(uuid.NAMESPACE_OID, f"{self.model_id}/{question}")),
                model_id=self.model_id,
                metadata={
                    "chat_prompt": self.generator.chat_prompt(question.marked_text),
                    **greedy(limit),
                },
            )
            for i, question in enumerate(questions)
        ]


def _who(question: Question) -> str:
    return f"question {question.question_id!r} (line {question.line})"
