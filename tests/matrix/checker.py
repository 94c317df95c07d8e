"""Holds exports to what the trainer says, in a process without this package.

Usage: python checker.py EXPORT ... Beside each export lies `EXPORT.trainer`, see
`trainer_answers.py`. Prints a JSON object: of each export the checks that failed and why, the
largest differences, and the release of transformers.
"""

from __future__ import annotations

import importlib.abc
import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# float32 on a CPU: two implementations order their sums differently; 1e-6 was seen, in logits of
# order one. A wrong position, mask or image moves them by 0.1 and more.
LOGITS_BOUND = 2e-5
# The trainer's resize follows Pillow's within two grey levels.
GREY_LEVELS = 2.01
FOREIGN = ("dattn_mcore", "megatron", "tools", "tests")


class Blocker(importlib.abc.MetaPathFinder):
    """Makes this project and Megatron-Core impossible to import."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in FOREIGN:
            raise ImportError(f"{name} is blocked in this process")


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocker())

import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationMixin,
    pipeline,
)

REMOTE = {"trust_remote_code": True}
# The name by which this release hands the cache around.
_ARGUMENTS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _ARGUMENTS else "past_key_values"


class Subject:
    """An export with the trainer's side of it; every method `check_*` is one check."""

    def __init__(self, export: Path) -> None:
        self.export = export
        self.trainer = export.with_name(f"{export.name}.trainer")
        cases = json.loads((self.trainer / "cases.json").read_text())
        self.turns, self.new_tokens = cases["turns"], cases["new_tokens"]
        self.tensors = load_file(self.trainer / "tensors.safetensors")
        self.processor = AutoProcessor.from_pretrained(export, **REMOTE)
        self.model = AutoModelForImageTextToText.from_pretrained(export, **REMOTE).eval()
        self.samples = range(len(self.turns[0]))
        self.image_id = self.model.config.image_token_id
        self.pad = self.processor.tokenizer.pad_token_id
        self.differences: dict[str, float] = {}
        self.tiles = [list(self._tiles_of_turn(turn)) for turn in (0, 1)]

    def _tiles_of_turn(self, turn: int) -> Iterator[list[tuple[Tensor, list[int]]]]:
        """Of each sample its images: (tiles, grid)."""
        grids = self.tensors[f"{turn}.grids"].tolist()
        sizes = [1 + columns * rows for columns, rows in grids]
        images = iter(zip(self.tensors[f"{turn}.pixels"].split(sizes), grids, strict=True))
        for sample in self.turns[turn]:
            yield [next(images) for _ in sample["images"]]

    # What is asked.

    def ids(self, sample: int, turn: int) -> list[int]:
        """The conversation up to where the model answers in this turn."""
        first, second = (turns[sample] for turns in self.turns)
        if turn == 0:
            return list(first["prompt"])
        return first["prompt"] + first["answer"] + second["prompt"]

    def inputs(self, samples: list[int], turn: int) -> dict[str, Tensor]:
        """Left-padded conversations with all their images, in the trainer's pixels."""
        prompts = [self.ids(sample, turn) for sample in samples]
        images = [image for s in samples for t in range(turn + 1) for image in self.tiles[t][s]]
        return self.padded(prompts) | self.pixels(images)

    def padded(self, prompts: list[list[int]]) -> dict[str, Tensor]:
        """Ids and mask of a batch."""
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        ids = [[self.pad] * n + prompt for n, prompt in zip(pads, prompts, strict=True)]
        mask = [[0] * n + [1] * (longest - n) for n in pads]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    def pixels(self, images: list[tuple[Tensor, list[int]]]) -> dict[str, Tensor]:
        """The model's arguments for images; a square tile has no grid, as the processor does."""
        if not images:
            return {}
        found = {"pixel_values": torch.cat([tiles for tiles, _ in images])}
        grids = torch.tensor([grid for _, grid in images])
        return found | ({"image_grids": grids} if grids.any() else {})

    # What must come out.

    def same_logits(self, name: str, found: Tensor, expected: Tensor) -> None:
        """Raises where logits differ from the trainer's by more than the bound."""
        assert found.shape == expected.shape, f"{list(found.shape)} and {list(expected.shape)}"
        difference = float((found.float() - expected).abs().max())
        self.differences[name] = max(difference, self.differences.get(name, 0.0))
        assert difference <= LOGITS_BOUND, f"logits differ from the trainer's by {difference:.3g}"

    def text_rows(self, inputs: dict[str, Tensor], logits: Tensor, row: int) -> Tensor:
        """Logits of a sample's text, without padding and placeholders."""
        live = inputs["attention_mask"][row].bool() & (inputs["input_ids"][row] != self.image_id)
        return logits[row, live]

    def generate(self, inputs: dict[str, Any], **changes: Any) -> Any:
        """Greedy answers of the trainer's length."""
        settings = {
            "max_new_tokens": self.new_tokens,
            "min_new_tokens": self.new_tokens,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        return self.model.generate(**inputs, **{**settings, **changes})

    def new(self, out: Any) -> list[list[int]]:
        """Tokens of the answers."""
        sequences = out if isinstance(out, Tensor) else out.sequences
        return sequences[:, -self.new_tokens :].tolist()

    def same_answers(self, name: str, out: Any, samples: list[int], turn: int) -> None:
        """Raises where tokens, or the logits behind them, are not the trainer's."""
        expected = [self.turns[turn][sample]["answer"] for sample in samples]
        assert self.new(out) == expected, f"answers {self.new(out)}, the trainer {expected}"
        logits = torch.stack(out.logits, dim=1)
        for row, sample in enumerate(samples):
            self.same_logits(name, logits[row], self.tensors[f"{turn}.{sample}.answer"])

    # Prompts.

    def check_processor(self) -> None:
        """Ids are the trainer's, pixels but for the resize, batched and padded on the left."""
        chats = [[{"role": "user", "content": case["text"]}] for case in self.turns[0]]
        texts = [self.processor.apply_chat_template(c, add_generation_prompt=True) for c in chats]
        files = [file for case in self.turns[0] for file in case["images"]]
        images = [Image.open(self.trainer / file) for file in files]
        found = self.processor(text=texts, images=images, padding=True, return_tensors="pt")
        expected = self.inputs(list(self.samples), 0)
        assert set(found) == set(expected), f"{sorted(found)} instead of {sorted(expected)}"
        for name in set(expected) - {"pixel_values"}:
            assert found[name].tolist() == expected[name].tolist(), name
        std = torch.tensor(self.processor.image_processor.image_std).view(3, 1, 1)
        difference = (found["pixel_values"] - expected["pixel_values"]) * std * 255
        self.differences["grey levels"] = float(difference.abs().max())
        assert self.differences["grey levels"] <= GREY_LEVELS, "pixels are not the trainer's"

    def chat_in_parts(self) -> list[dict[str, Any]]:
        """The first conversation, with its image in it."""
        case = self.turns[0][0]
        parts = [
            {"type": "image", "image": Image.open(self.trainer / case["images"][0])},
            {"type": "text", "text": case["text"].removeprefix("<image>\n")},
        ]
        return [{"role": "user", "content": parts}]

    def inputs_in_parts(self) -> Any:
        """Inputs of that conversation by one call."""
        return self.processor.apply_chat_template(
            self.chat_in_parts(),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    def check_chat_in_parts(self) -> None:
        """One call makes inputs of a conversation whose images stand in it."""
        found = self.inputs_in_parts()
        assert found["input_ids"].tolist() == [self.ids(0, 0)]
        assert found["pixel_values"].shape == self.inputs([0], 0)["pixel_values"].shape

    def check_prompt_alone(self) -> None:
        """Logits of every text row of each conversation, two turns long."""
        for sample in self.samples:
            inputs = self.inputs([sample], 1)
            logits = self.model(**inputs).logits
            rows = self.text_rows(inputs, logits, 0)
            self.same_logits("prompt_alone", rows, self.tensors[f"1.{sample}.prompt"])

    def check_prompt_batched(self) -> None:
        """The same in one batch, with several lengths and numbers of images."""
        inputs = self.inputs(list(self.samples), 1)
        logits = self.model(**inputs).logits
        for sample in self.samples:
            rows = self.text_rows(inputs, logits, sample)
            self.same_logits("prompt_batched", rows, self.tensors[f"1.{sample}.prompt"])

    # Generation.

    def check_cached(self) -> None:
        """A batch of several lengths and numbers of images."""
        samples = list(self.samples)
        self.same_answers("cached", self.generate(self.inputs(samples, 0)), samples, 0)

    def check_uncached(self) -> None:
        """The same without a cache."""
        samples = list(self.samples)
        out = self.generate(self.inputs(samples, 0), use_cache=False)
        self.same_answers("uncached", out, samples, 0)

    def check_images_kept(self) -> None:
        """With images computed, then found; a baseline, whose images are not kept, refuses."""
        if not hasattr(self.model, "make_image_cache"):  # release 0's code
            return
        samples, kept = list(self.samples), self.model.make_image_cache()
        config = self.model.config
        if (config.v2v, config.t2v_position) != ("diagonal", "none"):
            try:
                self.generate(self.inputs(samples, 0), image_cache=kept)
            except ValueError as error:
                assert "leave image_cache out" in str(error), error
                return
            raise AssertionError("a baseline's images were kept")
        for _ in range(2):
            out = self.generate(self.inputs(samples, 0), image_cache=kept)
            self.same_answers("images_kept", out, samples, 0)
        assert kept.misses and kept.hits >= kept.misses

    def check_alone(self) -> None:
        """Each sample for itself; one of them has no image."""
        for sample in self.samples:
            out = self.generate(self.inputs([sample], 0))
            self.same_answers("alone", out, [sample], 0)

    def check_text_only(self) -> None:
        """A batch without any image, of two lengths."""
        sample = next(s for s in self.samples if not self.turns[0][s]["images"])
        prompt = self.ids(sample, 0)
        inputs = self.padded([prompt, prompt + prompt])
        for use_cache in (True, False):
            out = self.generate(inputs, use_cache=use_cache)
            assert self.new(out)[0] == self.turns[0][sample]["answer"]
            logits = torch.stack(out.logits, dim=1)[0]
            self.same_logits("text_only", logits, self.tensors[f"0.{sample}.answer"])

    def check_second_turn_with_the_cache(self) -> None:
        """`generate` goes on with the cache of the first turn; only the new images are given."""
        for sample in self.samples:
            first = self.generate(self.inputs([sample], 0))
            inputs = self.padded([self.ids(sample, 1)]) | self.pixels(self.tiles[1][sample])
            out = self.generate({**inputs, CACHE: first[CACHE]})
            self.same_answers("second_turn_with_the_cache", out, [sample], 1)

    def check_second_turn_with_all_images(self) -> None:
        """The same where all images are given, as a chat's processor does."""
        for sample in self.samples:
            first = self.generate(self.inputs([sample], 0))
            out = self.generate({**self.inputs([sample], 1), CACHE: first[CACHE]})
            self.same_answers("second_turn_with_all_images", out, [sample], 1)

    def check_second_turn_batched(self) -> None:
        """A batch goes on with its cache; padding stands between its turns."""
        samples = list(self.samples)
        before = self.inputs(samples, 0)
        first = self.generate(before)
        after = self.padded([self.turns[1][sample]["prompt"] for sample in samples])
        said = torch.tensor(self.new(first))
        parts = [before["input_ids"], said, after["input_ids"]]
        masks = [before["attention_mask"], torch.ones_like(said), after["attention_mask"]]
        images = [image for sample in samples for image in self.tiles[1][sample]]
        inputs = {"input_ids": torch.cat(parts, dim=1), "attention_mask": torch.cat(masks, dim=1)}
        inputs |= self.pixels(images)
        out = self.generate({**inputs, CACHE: first[CACHE]})
        self.same_answers("second_turn_batched", out, samples, 1)

    def check_second_turn_without(self) -> None:
        """The whole conversations anew, in a batch, with and without a cache of their own."""
        samples = list(self.samples)
        for use_cache in (True, False):
            out = self.generate(self.inputs(samples, 1), use_cache=use_cache)
            self.same_answers("second_turn_without", out, samples, 1)

    def check_forward_with_the_cache(self) -> None:
        """A cache is gone on with by `forward`, by any name that it does not refuse."""
        taken = 0
        for name in ("past_key_values", "cache"):
            for sample in self.samples:
                first = self.inputs([sample], 0)
                images = self.pixels(self.tiles[1][sample])
                ids = torch.tensor([self.ids(sample, 1)])
                columns = first["input_ids"].shape[1]
                out = self.model(**first, use_cache=True)
                arguments = {"input_ids": ids[:, columns:], **images, name: out[CACHE]}
                try:
                    logits = self.model(**arguments).logits[0]
                except (TypeError, ValueError):
                    assert name != CACHE, f"{name} is how this release names the cache"
                    continue
                rows = logits[ids[0, columns:] != self.image_id]
                expected = self.tensors[f"1.{sample}.prompt"][-len(rows) :]
                self.same_logits(f"forward with {name}", rows, expected)
                taken += 1
        assert taken, "forward takes no cache"

    def check_beams(self) -> None:
        """Images stay with their sample when samples are repeated."""
        samples = list(self.samples)
        settings = {"num_beams": 3, "num_return_sequences": 2, "output_logits": False}
        batched = self.new(self.generate(self.inputs(samples, 0), **settings))
        uncached = self.new(self.generate(self.inputs(samples, 0), use_cache=False, **settings))
        assert batched == uncached, "cached and uncached differ"
        for sample in (1, 3):
            alone = self.new(self.generate(self.inputs([sample], 0), **settings))
            assert alone == batched[2 * sample : 2 * sample + 2], f"sample {sample} alone differs"

    def check_several_answers(self) -> None:
        """`num_return_sequences` repeats samples without beams; one candidate makes it greedy."""
        samples = list(self.samples)
        settings = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
        out = self.generate(self.inputs(samples, 0), **settings)
        self.same_answers("several_answers", out, [s for s in samples for _ in range(2)], 0)

    def check_prompt_lookup(self) -> None:
        """Wrong guesses are cropped from the cache. Some releases answer a token too many."""
        for sample in self.samples:
            inputs = self.inputs([sample], 1)
            settings = {"prompt_lookup_num_tokens": 3, "output_logits": False}
            out = self.generate(inputs, **settings).sequences[0, inputs["input_ids"].shape[1] :]
            assert out[: self.new_tokens].tolist() == self.turns[1][sample]["answer"], sample

    # Other ways in.

    def check_causal_lm(self) -> None:
        """The other Auto class loads the same model."""
        model = AutoModelForCausalLM.from_pretrained(self.export, **REMOTE).eval()
        assert type(model).__name__ == type(self.model).__name__
        inputs = self.inputs([1], 0)
        rows = self.text_rows(inputs, model(**inputs).logits, 0)
        self.same_logits("causal_lm", rows, self.tensors["0.1.prompt"])

    def check_pipeline(self) -> None:
        """transformers' pipeline says what processor and model say."""
        ask = pipeline("image-text-to-text", model=self.model, processor=self.processor)
        settings = {"max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens}
        (found,) = ask(text=self.chat_in_parts(), return_full_text=False, **settings)
        (answer,) = self.new(self.generate(self.inputs_in_parts()))
        expected = self.processor.tokenizer.decode(answer, skip_special_tokens=True)
        assert found["generated_text"] == expected

    def check_saved_again(self) -> None:
        """A user saves the model and loads it: code and weights come along."""
        with tempfile.TemporaryDirectory() as folder:
            again = Path(folder) / f"{self.export.name}_again"
            self.model.save_pretrained(again)
            self.processor.save_pretrained(again)
            model = AutoModelForImageTextToText.from_pretrained(again, **REMOTE).eval()
            processor = AutoProcessor.from_pretrained(again, **REMOTE)
        assert processor.image_token_id == self.image_id
        inputs = self.inputs([1], 0)
        rows = self.text_rows(inputs, model(**inputs).logits, 0)
        self.same_logits("saved_again", rows, self.tensors["0.1.prompt"])

    def check_nothing_foreign(self) -> None:
        """The model is the folder's own code, and nothing of this project came along."""
        assert type(self.model).__module__.startswith("transformers_modules.")
        found = sorted(name for name in sys.modules if name.split(".")[0] in FOREIGN)
        assert not found, found


def examine(export: Path) -> dict[str, Any]:
    """Runs all checks on one export."""
    try:
        subject = Subject(export)
    except Exception as error:  # noqa: BLE001  (whatever a release does with the folder's code)
        return {"failed": {"load": _line(error)}, "passed": [], "differences": {}}
    failed, passed = {}, []
    for name, check in _checks(subject):
        try:
            with torch.no_grad():
                check()
            passed.append(name)
        except Exception as error:  # noqa: BLE001
            failed[name] = _line(error)
    return {"failed": failed, "passed": passed, "differences": subject.differences}


CHECKS = [name.removeprefix("check_") for name in vars(Subject) if name.startswith("check_")]


def _checks(subject: Subject) -> list[tuple[str, Callable[[], None]]]:
    return [(name, getattr(subject, f"check_{name}")) for name in CHECKS]


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def main(exports: list[str]) -> None:
    """Examines exports one after the other."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    reports = {Path(export).name: examine(Path(export)) for export in exports}
    json.dump({"transformers": transformers.__version__, "exports": reports}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
