"""Answers prompts with images by a Hugging Face model: batched greedy generation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

import dattn_mcore.hf
from dattn_mcore.errors import CheckpointError, ConfigError, DataError
from dattn_mcore.evaluation.adapter import with_adapter
from dattn_mcore.evaluation.batch_inputs import batch_inputs
from dattn_mcore.evaluation.by_image import key_of, order_by_image
from dattn_mcore.evaluation.files import read_object
from dattn_mcore.evaluation.images import Picture
from dattn_mcore.evaluation.self_check import (
    BOUND,
    NEW_TOKENS,
    SelfCheckError,
    compare_batched,
    compare_generation,
    saying_versions,
)
from dattn_mcore.hf import NO_FOREIGN_CODE, DattnImageCache
from dattn_mcore.hf.image_cache_dattn import mode_problem
from dattn_mcore.parallel.gpus import gpu_problem

logger = logging.getLogger(__name__)
GIB = 2**30
LONGER = "Answer in one short sentence."  # makes a prompt longer, so that another is padded
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
        who: what messages call it.
        text: the user's turn, with one `<image>` for every picture.
        pictures: its images, decoded when their batch is prepared.
    """

    who: str
    text: str
    pictures: tuple[Picture, ...]


def resolve_device(device: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """Turns auto, cpu or gpu into a device; processes of one machine take one GPU each.

    Raises:
        ConfigError: the word is unknown, there is no GPU, PyTorch cannot use those that there are,
            or there are fewer GPUs than processes.
    """
    if device not in ("auto", "cpu", "gpu"):
        raise ConfigError(f"--device is {device!r}; it must be auto, cpu or gpu")
    if device != "cpu" and (problem := gpu_problem()):
        raise ConfigError(f"--device {device}: {problem}; or use --device cpu")
    found = torch.accelerator.current_accelerator(check_available=True)
    if device == "gpu" and found is None:
        raise ConfigError("--device gpu needs a GPU that PyTorch can see; use --device cpu")
    if device == "cpu" or found is None:
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    if local_size > count:
        raise ConfigError(
            f"{local_size} processes need a GPU each, this machine has {count}; run torchrun "
            f"--nproc-per-node {count}, or give --device cpu"
        )
    return torch.device(found.type, local_rank)


class Generator:
    """A loaded model with its processor.

    Args:
        folder: exported folder.
        device: where it runs.
        dtype: auto (as stored), float32 or bfloat16.
        adapter: folder of `peft` whose adapters are added to the weights; None: none are.
        image_cache_gib: memory for the keys and values of images that are shown again; 0: none.

    Attributes:
        image_cache: them; None where they are not kept, or the model's mode has none to keep.

    Raises:
        CheckpointError: a folder cannot be loaded, or they do not fit each other.
        ConfigError: `peft` is needed and not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        device: torch.device,
        dtype: str = "auto",
        adapter: Path | None = None,
        image_cache_gib: float = 0.0,
    ) -> None:
        self.folder = Path(folder)
        self.device = device
        self.model_id = self.folder.resolve().name
        if adapter is not None:
            self.model_id += f"+{adapter.resolve().name}"
        check_model_folder(self.folder)
        dattn_mcore.hf.register()
        transformers_logging.disable_progress_bar()
        try:
            self.processor: Any = AutoProcessor.from_pretrained(str(folder), **NO_FOREIGN_CODE)
            model: Any
            loaded: Any
            model, loaded = AutoModelForImageTextToText.from_pretrained(
                str(folder),
                dtype=DTYPES[dtype],
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `check_weights` reports them
                **NO_FOREIGN_CODE,
            )
        except Exception as error:  # transformers raises whatever its parts raise
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"--model {folder} cannot be loaded ({reason})") from error
        check_weights(self.folder, loaded)
        if adapter is not None:
            model = with_adapter(model, adapter)
        if not getattr(self.processor, "chat_template", None):
            raise CheckpointError(
                f"--model {folder} has no chat template, which every prompt needs; copy "
                "chat_template.jinja into it, or export it again"
            )
        self.model = model.eval().to(device)
        self.image_cache: DattnImageCache | None = None
        if image_cache_gib > 0:
            if problem := mode_problem(self.model.config):
                logger.info("images are computed anew for each question: %s", problem)
            else:
                self.image_cache = DattnImageCache(int(image_cache_gib * GIB))

    def chat_prompt(self, text: str) -> str:
        """A user's turn in the model's chat template."""
        chat = [{"role": "user", "content": text}]
        return str(self.processor.apply_chat_template(chat, add_generation_prompt=True))

    def generate(
        self, requests: Sequence[Request], batch_size: int, max_new_tokens: int, **more: Any
    ) -> Iterator[dict[int, str]]:
        """Answers requests batch by batch, those of like size together and the largest first.

        With an image cache those about the same images come together. Memory runs out at once or
        never. The next batch is prepared while one generates.

        Args:
            requests: what to answer.
            batch_size: requests generated at once.
            max_new_tokens: longest answer, in tokens.
            **more: further settings of `generate`.

        Yields:
            Answers of one batch by index of their request.

        Raises:
            DataError: an image is missing or damaged.
        """
        prompts = [self.chat_prompt(request.text) for request in requests]
        if self.image_cache is None:
            order = sorted(
                range(len(requests)),
                key=lambda i: (len(requests[i].pictures), len(prompts[i])),
                reverse=True,
            )
        else:
            keys = [key_of(request.pictures) for request in requests]
            order = order_by_image(keys, [len(prompt) for prompt in prompts])
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        settings = {**greedy(max_new_tokens), **more}
        with ThreadPoolExecutor(1) as pool:
            ready = [pool.submit(self._inputs, requests, prompts, b) for b in batches[:1]]
            for number, batch in enumerate(batches):
                inputs = ready.pop().result()
                for following in batches[number + 1 : number + 2]:
                    ready.append(pool.submit(self._inputs, requests, prompts, following))
                yield dict(zip(batch, self._answers(inputs, settings), strict=True))

    def _inputs(self, requests: Sequence[Request], prompts: list[str], batch: list[int]) -> Any:
        shown = [(requests[i].who, p) for i in batch for p in requests[i].pictures]
        return batch_inputs(self.processor, [prompts[i] for i in batch], shown)

    def self_check(self, request: Request, batch_size: int) -> str:
        """Checks on one prompt that the model says the same with and without its cache, and alone.

        Args:
            request: what is asked first.
            batch_size: 1: nothing is asked in batches, so they are not checked.

        Returns:
            What was compared, for the log.

        Raises:
            SelfCheckError: it does not; one line with both versions and the tested range.
            DataError: an image is missing or damaged.
        """
        longer = replace(request, text=f"{request.text}\n{LONGER}")
        both = [request, longer] if batch_size > 1 else [request]
        prompts = [self.chat_prompt(asked.text) for asked in both]
        prepared = [self._inputs(both, prompts, [0])]
        if batch_size > 1:
            prepared.append(self._inputs(both, prompts, [0, 1]))
        way_out = ", or a newer dattn_mcore, whose code answers here in place of the folder's own"
        with saying_versions(f"--model {self.folder}", way_out):
            first = prepared[0].to(self.device)
            agreement = compare_generation(self.model, first)
            with torch.inference_mode():  # in its own dtype, which float16 can overflow
                if not self.model(**first, use_cache=False).logits.isfinite().all():
                    raise SelfCheckError(f"in {self.model.dtype} its logits are not finite")
            largest, batched = agreement.difference, ""
            for batch in prepared[1:]:
                largest = max(
                    largest, compare_batched(self.model, batch.to(self.device), agreement)
                )
                batched = ", alone and in a batch"
            if self.image_cache is not None and request.pictures:
                held = {"image_cache": self.image_cache}
                # Computed, then found; a batch reads one copy of what its prompts show.
                for asked in (first, *prepared):
                    batch = asked.to(self.device)
                    found = compare_batched(self.model, batch, agreement, held)
                    largest = max(largest, found)
                self.image_cache.clear()
                batched += ", and with the images from their cache"
        return (
            f"self-check: {NEW_TOKENS} tokens with and without the cache{batched} agree (logits in "
            f"float32 differ by {largest:.1g} of their spread, bound {BOUND:.0e})"
        )

    @torch.inference_mode()
    def _answers(self, inputs: Any, settings: dict[str, Any]) -> list[str]:
        inputs = inputs.to(self.device)
        if self.image_cache is not None:
            settings = {**settings, "image_cache": self.image_cache}
        try:
            tokens = self.model.generate(**inputs, **settings)
        except torch.OutOfMemoryError:
            if self.image_cache is None or not self.image_cache.nbytes:
                raise
            logger.warning(
                "the GPU's memory does not hold %.1f GiB of images' keys and values beside a "
                "batch; none are kept from here on",
                self.image_cache.nbytes / GIB,
            )
            self.image_cache.clear()
            self.image_cache.max_bytes = 0
            tokens = self.model.generate(**inputs, **settings)
        new = tokens[:, inputs["input_ids"].shape[1] :].cpu()
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]


def check_model_folder(folder: Path) -> None:
    """Raises CheckpointError where a folder is clearly no exported D-Attn model."""
    path = folder / "config.json"
    way_out = "give an exported folder (python -m tools.checkpoint_convert mcore-to-hf RUN FOLDER)"
    if not path.is_file():
        raise CheckpointError(f"--model {folder} has no config.json; {way_out}")
    try:
        kind = read_object(path, "config").get("model_type")
    except DataError as error:
        raise CheckpointError(f"--model {folder} cannot be loaded ({error}); {way_out}") from None
    if kind != "dattn":
        raise CheckpointError(
            f"--model {folder} has model_type {kind!r} in its config.json; it must be 'dattn': "
            f"{way_out}"
        )


def check_weights(folder: Path, loaded: Mapping[str, Any]) -> None:
    """Raises CheckpointError where transformers left tensors at random values, or passed some over.

    Args:
        folder: exported folder.
        loaded: what `from_pretrained` says about loading; tied weights are not missing.
    """
    wrong = []
    for kind in ("missing", "unexpected", "mismatched"):
        # Of a mismatched one transformers gives the name and both shapes.
        names = sorted(k if isinstance(k, str) else k[0] for k in loaded[f"{kind}_keys"])
        if names:
            first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            wrong.append(f"{len(names)} {kind} ({first})")
    if wrong:
        raise CheckpointError(
            f"--model {folder}: its weights do not fit its config.json: {'; '.join(wrong)}; copy "
            "or export the folder again"
        )


def greedy(max_new_tokens: int) -> dict[str, Any]:
    """Settings of `generate` for LLaVA's temperature 0 and one beam."""
    return {"max_new_tokens": max_new_tokens, "num_beams": 1, "do_sample": False}
