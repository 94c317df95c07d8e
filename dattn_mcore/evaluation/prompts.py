"""What a prompt asks, apart from all that a harness may put around the question."""

from __future__ import annotations

import re

from dattn_mcore.types import IMAGE_MARK

OCR_MARK = "Reference OCR token:"
# Lines that harnesses put around a question: with or without them it is the same question.
_AROUND = (
    OCR_MARK,
    "Answer the question using",
    "Answer with the option's letter",
    "请直接回答选项字母",
    "When the provided information is insufficient",
    "Options:",
)
_CHOICE = re.compile(r"\(?[A-Z][.):] ")


def words_asked(prompt: str) -> str:
    """The question of a prompt: no instructions, OCR tokens or choices; lower case, one line."""
    lines = [line.strip() for line in prompt.replace(IMAGE_MARK, "\n").split("\n")]
    kept = [line for line in lines if not line.startswith(_AROUND) and not _CHOICE.match(line)]
    return " ".join(" ".join(kept or lines).lower().split())


def same_question(one: str, other: str) -> bool:
    """Whether two prompts ask the same: one's question stands, word by word, in the other's."""
    a, b = (f" {words_asked(prompt)} " for prompt in (one, other))
    return a in b or b in a
