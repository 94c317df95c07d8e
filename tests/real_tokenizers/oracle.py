"""Ids of conversations as the makers of the tokenizers write them: `python oracle.py NAME FOLDER`.

Reads conversations as JSON, and prints their ids and where the tokenizer lies. It knows the makers'
packages and transformers, and nothing of this project. A byte-level tokenizer (Tiktoken's files)
becomes a folder as transformers reads it, by its converter.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Conversation = dict[str, Any]


def mistral_v2(work: Path, conversations: Sequence[Conversation]) -> tuple[Path, list[list[int]]]:
    """Mistral 7B v0.2's SentencePiece file."""
    return _mistral("mistral_instruct_tokenizer_240216.model.v2", conversations)


def mistral_v3(work: Path, conversations: Sequence[Conversation]) -> tuple[Path, list[list[int]]]:
    """Mistral 7B v0.3's SentencePiece file."""
    return _mistral("mistral_instruct_tokenizer_240323.model.v3", conversations)


def mistral_v1(work: Path, conversations: Sequence[Conversation]) -> tuple[Path, list[list[int]]]:
    """Mistral 7B v0.1's SentencePiece file, whose vocabulary has no tokens for turns."""
    return _mistral("tokenizer.model.v1", conversations)


def _mistral(name: str, conversations: Sequence[Conversation]) -> tuple[Path, list[list[int]]]:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    file = _mistral_data() / name

    def tokenizer(mode: Any) -> Any:
        return MistralTokenizer.from_file(str(file), mode=mode)

    return file, _by_mistral(tokenizer, conversations)


def _mistral_data() -> Path:
    return _package("mistral_common") / "data"


def _by_mistral(tokenizer: Callable[[Any], Any], all_of: Sequence[Conversation]) -> list[list[int]]:
    """Ids by `encode_chat_completion`: prompts as for serving, whole conversations as for training."""
    from mistral_common.protocol.instruct.messages import (
        AssistantMessage,
        SystemMessage,
        UserMessage,
    )
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode

    serving, training = tokenizer(ValidationMode.test), tokenizer(ValidationMode.finetuning)
    found = []
    for one in all_of:
        system = [SystemMessage(content=one["system"])] if one["system"] else []
        turns = [
            AssistantMessage(content=said) if number % 2 else UserMessage(content=said)
            for number, said in enumerate(one["turns"])
        ]
        request = ChatCompletionRequest(messages=[*system, *turns])
        chosen = serving if len(turns) % 2 else training
        found.append(chosen.encode_chat_completion(request).tokens)
    return found


def mistral_tekken(
    work: Path, conversations: Sequence[Conversation]
) -> tuple[Path, list[list[int]]]:
    """Tekken, with the turns of version 7.

    Special tokens stand in front of the others there and behind them in the folder.
    """
    from mistral_common.protocol.instruct.normalize import normalizer_for_tokenizer_version
    from mistral_common.protocol.instruct.validator import MistralRequestValidatorV5
    from mistral_common.tokens.tokenizers.base import TokenizerVersion
    from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV7
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    file = _mistral_data() / "tekken_240911.json"
    tekken = Tekkenizer.from_file(file)
    content = json.loads(file.read_text(encoding="utf-8"))
    in_front = tekken.num_special_tokens
    ordinary = tekken.n_words - in_front
    ranks = work / "tekken.tiktoken"
    lines = [f"{word['token_bytes']} {word['rank']}\n" for word in content["vocab"][:ordinary]]
    ranks.write_text("".join(lines))
    names = [str(getattr(name, "value", name)) for name in map(tekken.id_to_piece, range(20))]
    folder = _folder(work, ranks, content["config"]["pattern"], names, bos="<s>", eos="</s>")

    def tokenizer(mode: Any) -> Any:
        return MistralTokenizer(
            InstructTokenizerV7(tekken),
            validator=MistralRequestValidatorV5(mode=mode),
            request_normalizer=normalizer_for_tokenizer_version(TokenizerVersion.v7),
        )

    def moved(number: int) -> int:
        return number - in_front if number >= in_front else number + ordinary

    found = _by_mistral(tokenizer, conversations)
    return folder, [[moved(number) for number in ids] for ids in found]


def llama3(work: Path, conversations: Sequence[Conversation]) -> tuple[Path, list[list[int]]]:
    """Llama 3's file and `ChatFormat`."""
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer

    file = _package("llama_models") / "llama3/tokenizer.model"
    own = Tokenizer(file)
    folder = _folder(
        work,
        file,
        own.pat_str,
        list(own.special_tokens),
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
    )
    chat = ChatFormat(own)
    asks = chat.encode_dialog_prompt(
        []
    )  # what stands in front of an answer, behind the first token
    found = []
    for one in conversations:
        said = [("system", one["system"])] if one["system"] else []
        said += [("assistant" if n % 2 else "user", turn) for n, turn in enumerate(one["turns"])]
        messages = [RawMessage(role=role, content=text) for role, text in said]
        ids = chat.encode_dialog_prompt(messages).tokens
        if len(one["turns"]) % 2 == 0:
            ids = ids[: -(len(asks.tokens) - 1)]
        found.append(ids)
    return folder, found


# Source: the ChatML of Qwen's model cards, which has no function of its own in the package.
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
THOUGHT = "<think>\n\n</think>\n\n"


def qwen_chatml(work: Path, conversations: Sequence[Conversation]) -> tuple[Path, list[list[int]]]:
    """Qwen's file, with the turns of Qwen2.5."""
    own, folder = _qwen(work)
    texts = [_chatml(one["system"] or QWEN_SYSTEM, one["turns"]) for one in conversations]
    return folder, [own.encode(text) for text in texts]


def qwen3(work: Path, conversations: Sequence[Conversation]) -> tuple[Path, list[list[int]]]:
    """Qwen's file, with the turns of Qwen3, thinking off.

    The marks of a thought are no tokens of the file: the folder has them at its end, and what is
    between them is encoded alone.
    """
    own, folder = _qwen(work)
    last = len(own._mergeable_ranks) + 3
    found = []
    for one in conversations:
        text = _chatml(one["system"], one["turns"], THOUGHT)
        before, _, rest = text.partition("<think>")
        between, _, after = rest.partition("</think>")
        pieces = [own.encode(piece) for piece in (before, between, after)]
        found.append([*pieces[0], last, *pieces[1], last + 1, *pieces[2]])
    return folder, found


def _chatml(system: str, turns: Sequence[str], before_last_answer: str = "") -> str:
    text = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    last = (len(turns) - 1) // 2 * 2
    for number, said in enumerate(turns):
        if number % 2 == 0:
            text += f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
            text += before_last_answer if number == last else ""
        else:
            text += f"{said}<|im_end|>\n"
    return text


def _qwen(work: Path) -> tuple[Any, Path]:
    """Their tokenizer, and the folder; without the rest of their package, which is a web client."""
    package = _package("dashscope")
    for name, place in (("dashscope", package), ("dashscope.tokenizers", package / "tokenizers")):
        parent = types.ModuleType(name)
        parent.__path__ = [str(place)]
        sys.modules[name] = parent
    from dashscope.tokenizers.qwen_tokenizer import PAT_STR, QwenTokenizer

    file = package / "resources/qwen.tiktoken"
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    folder = _folder(
        work, file, PAT_STR, names, eos="<|im_end|>", more=("<think>", "</think>"), nfc=True
    )
    return QwenTokenizer(str(file)), folder


def _folder(
    work: Path,
    ranks: Path,
    pattern: str,
    special: list[str],
    eos: str,
    bos: str | None = None,
    more: Sequence[str] = (),
    nfc: bool = False,
) -> Path:
    """A folder of transformers with a Tiktoken file's vocabulary.

    Args:
        work: where it is made.
        ranks: the file.
        pattern: how a text is cut before merging.
        special: special tokens, whose ids follow the file's.
        eos: token that ends a text.
        bos: token that begins one.
        more: further tokens, not special.
        nfc: whether texts are composed first.
    """
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter(str(ranks), pattern=pattern, extra_special_tokens=special)
    backend = converter.converted()
    if nfc:
        backend.normalizer = normalizers.NFC()
    first = {"bos_token": bos} if bos else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, **first)
    fast.add_tokens(list(more))
    folder = work / "tokenizer"
    fast.save_pretrained(folder)
    return folder


def _package(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


ORACLES = {
    "mistral_v1": mistral_v1,
    "mistral_v2": mistral_v2,
    "mistral_v3": mistral_v3,
    "mistral_tekken": mistral_tekken,
    "llama3": llama3,
    "qwen_chatml": qwen_chatml,
    "qwen3": qwen3,
}


if __name__ == "__main__":
    name, work = sys.argv[1:]
    place, ids = ORACLES[name](Path(work), json.load(sys.stdin))
    print(json.dumps({"tokenizer": str(place), "ids": ids}))
