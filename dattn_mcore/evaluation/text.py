"""How answers are read: letters of choices, yes or no, and the normaliser of the VQA servers."""

from __future__ import annotations

import re
from collections.abc import Sequence

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDE"

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"}
_NUMBERS |= {"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
# Words that get their apostrophes back, where all of them are missing.
_APOSTROPHES = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's "
    "how'd how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've "
    "o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll "
    "someone's something'd something'll that's there'd there're there's they'd they'll they're "
    "they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's "
    "where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd "
    "you'll you're you've"
)
# Words with two apostrophes of which one is missing, either of them.
_DOUBLE = (
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've someone'd've "
    "something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've"
)
# The original table's irregular entries.
_IRREGULAR = {
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "somebody'd": "somebodyd",
    "somebodyd've": "somebody'd've",
    "somebody'dve": "somebody'd've",
}


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _APOSTROPHES.split()}
    for word in _DOUBLE.split():
        for place in (i for i, letter in enumerate(word) if letter == "'"):
            table[word[:place] + word[place + 1 :]] = word
    return table | _IRREGULAR


_CONTRACTIONS = _contractions()


def normalise_answer(text: str) -> str:
    """An answer as the VQA servers and the TextVQA scorer compare it.

    Its quirks are part of the metric and are kept: `A` becomes nothing, `a/b` becomes `b`, `none`
    becomes `0`, `3. 5` becomes `3 5`, and only the first 32 full stops go.

    Source: behaviour of EvalAIAnswerProcessor in LLaVA's llava/eval/m4c_evaluator.py.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    spaced = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in spaced or f" {mark}" in spaced
        text = text.replace(mark, "" if beside_space else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def yes_or_no(text: str) -> str:
    """Reads yes, no or other: what stands first in the first four letters.

    Source: MME's eval_tool/calculation.py.
    """
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def says_no(text: str) -> bool:
    """Whether the first sentence holds No, not or no as a word of its own; all else is a yes.

    Source: POPE's evaluation, as in LLaVA's llava/eval/eval_pope.py.
    """
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return any(word in words for word in ("No", "not", "no"))


def leading_letter(text: str, letters: str = LETTERS) -> str | None:
    """The letter of a choice in answers such as `B`, `B.`, `(B) two`, `b: two`; None: no letter.

    A capital may be followed by anything but a letter or digit; a small letter needs a mark after
    it or must stand alone, so that the article in "a dog" is no choice.
    """
    found = re.match(r"\(?([A-Za-z])(?![A-Za-z0-9])", text.strip())
    if not found or found[1].upper() not in letters:
        return None
    rest = text.strip()[found.end() :]
    if found[1].islower() and rest[:1].isspace():
        return None
    if found[1] == "A" and re.match(r" +[a-z]", rest):  # "A dog": an article
        return None
    return found[1].upper()


def lenient_hint(unread: Sequence[str], letters: str = LETTERS) -> str:
    """The end of a note on answers that are no letter: how many `--lenient-letters` would read."""
    count = sum(leading_letter(text, letters) is not None for text in unread)
    return f"; --lenient-letters reads one in {count} of them" if count else ""
