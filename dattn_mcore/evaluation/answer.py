"""Answers questions with a Hugging Face model: batched greedy generation."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import dattn_mcore.hf
from dattn_mcore.errors import CheckpointError, ConfigError
from dattn_mcore.evaluation.images import check_images, open_image
from dattn_mcore.evaluation.questions import Answer, Question

Progress = Callable[[int, int], None]  # questions answered, questions in all


@dataclass(frozen=True)
class Settings:
    """How answers are generated.

    Attributes:
        batch_size: questions generated at once.
        max_new_tokens: longest answer.
        device: auto, cpu or gpu.
    """

    batch_size: int = 32
    max_new_tokens: int = 128
    device: str = "auto"


def resolve_device(device: str) -> torch.device:
    """Turns auto, cpu or gpu into a device.

    Raises:
        ConfigError: the word is unknown, or there is no GPU.
    """
    if device not in ("auto", "cpu", "gpu"):
        raise ConfigError(f"--device is {device!r}; it must be auto, cpu or gpu")
    found = torch.accelerator.current_accelerator(check_available=True)
    if device == "gpu" and found is None:
        raise ConfigError("--device gpu needs a GPU that PyTorch can see; use --device cpu")
    return torch.device("cpu") if device == "cpu" or found is None else found


class Answerer:
    """A loaded model with its processor.

    Args:
        folder: exported folder.
        settings: see `Settings`.

    Raises:
        CheckpointError: the folder cannot be loaded.
        ConfigError: the device is not there.
    """

    def __init__(self, folder: str | Path, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.device = resolve_device(self.settings.device)
        self.model_id = Path(folder).resolve().name
        dattn_mcore.hf.register()
        if not (Path(folder) / "config.json").is_file():
            raise CheckpointError(
                f"--model {folder} has no config.json; give an exported folder (python -m "
                "tools.checkpoint_convert mcore-to-hf RUN FOLDER)"
            )
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.processor: Any = AutoProcessor.from_pretrained(str(folder), **local)
            model: Any = AutoModelForImageTextToText.from_pretrained(
                str(folder), dtype="auto", **local
            )
        except Exception as error:  # transformers raises whatever its parts raise
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"--model {folder} cannot be loaded ({reason})") from error
        self.model = model.eval().to(self.device)

    def prompt(self, question: Question) -> str:
        """The question in the model's chat template."""
        chat = [{"role": "user", "content": question.marked_text}]
        return str(self.processor.apply_chat_template(chat, add_generation_prompt=True))

    def answer(
        self,
        questions: Sequence[Question],
        image_folder: str | Path,
        progress: Progress = lambda done, total: None,
    ) -> list[Answer]:
        """Answers all questions, in their order.

        Raises:
            DataError: an image is missing, damaged or outside the folder.
        """
        pairs = [(_who(q), image) for q in questions for image in q.images]
        root = check_images(image_folder, pairs)
        texts: dict[int, str] = {}
        prompts = [self.prompt(question) for question in questions]
        batches = list(self._batches(questions, prompts))
        done = 0
        with ThreadPoolExecutor(1) as pool:  # prepares the next batch while this one generates
            waiting = [pool.submit(self._inputs, questions, prompts, b, root) for b in batches[:1]]
            for number, batch in enumerate(batches):
                inputs = waiting.pop().result()
                if number + 1 < len(batches):
                    following = batches[number + 1]
                    waiting.append(pool.submit(self._inputs, questions, prompts, following, root))
                texts |= zip(batch, self._generate(inputs), strict=True)
                done += len(batch)
                progress(done, len(questions))
        return [
            Answer(
                question_id=question.question_id,
                prompt=question.text,
                text=texts[i],
                answer_id=str(uuid.uuid5(uuid.NAMESPACE_OID, f"{self.model_id}/{question}")),
                model_id=self.model_id,
                metadata={"chat_prompt": prompts[i], **self._generation_settings()},
            )
            for i, question in enumerate(questions)
        ]

    def _generation_settings(self) -> dict[str, Any]:
        return {"max_new_tokens": self.settings.max_new_tokens, "num_beams": 1, "do_sample": False}

    def _batches(self, questions: Sequence[Question], prompts: list[str]) -> Iterator[list[int]]:
        """Questions of like size together, the largest first (memory runs out at once or never)."""
        order = sorted(
            range(len(questions)),
            key=lambda i: (len(questions[i].images), len(prompts[i])),
            reverse=True,
        )
        for start in range(0, len(order), self.settings.batch_size):
            yield order[start : start + self.settings.batch_size]

    def _inputs(
        self, questions: Sequence[Question], prompts: list[str], batch: list[int], root: Path
    ) -> Any:
        images = [
            open_image(root, path, _who(questions[i]))
            for i in batch
            for path in questions[i].images
        ]
        return self.processor(
            text=[prompts[i] for i in batch],
            images=images or None,
            padding=True,
            return_tensors="pt",
        )

    @torch.inference_mode()
    def _generate(self, inputs: Any) -> list[str]:
        inputs = inputs.to(self.device)
        tokens = self.model.generate(**inputs, **self._generation_settings())
        new = tokens[:, inputs["input_ids"].shape[1] :].cpu()
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]


def _who(question: Question) -> str:
    return f"question {question.question_id!r} (line {question.line})"
