"""Chat templates as segments: one description for training (ids) and for export (Jinja).

Ids are built from segments and never searched for in a tokenised whole: a `Token` is one id, a
`Text` one call of the tokenizer. Jinja text is written from the same segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Roles of tokens, whose spelling the tokenizer knows. Where it has no BOS, its EOS stands there.
BOS, EOS = "bos", "eos"


@dataclass(frozen=True)
class Token:
    """One special token.

    Attributes:
        name: its spelling, or `BOS` or `EOS`.
        supervised: whether the model learns to predict it.
    """

    name: str
    supervised: bool = False


@dataclass(frozen=True)
class Text:
    """One piece of text.

    Attributes:
        before, after: fixed text around what is said.
        holds: `said` (the turn's text stands between them) or `nothing`.
        supervised: whether the model learns to predict it.
        opens: the tokenizer's own space in front of a text is put there, if it has one and
            something is said.
    """

    before: str = ""
    holds: Literal["said", "nothing"] = "nothing"
    after: str = ""
    supervised: bool = False
    opens: bool = False


@dataclass(frozen=True)
class Images:
    """The places of the turn's images, without its text."""


Segment = Token | Text | Images


@dataclass(frozen=True)
class Tools:
    """How a template writes tools, calls of them and their responses: as plain text.

    Attributes:
        before, after: around the tools, in the system turn behind its text; each stands on a line.
        call: around a call; calls stand behind what an answer says, on lines of their own.
        response: around a response; those before an answer are one turn of the user.
    """

    before: str
    after: str
    call: tuple[str, str]
    response: tuple[str, str]


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation becomes ids.

    Attributes:
        name: `data.template`.
        begin: once, in front of everything.
        user, answer: a turn; outer white space of what is said is dropped.
        stop: the token that ends an answer.
        system: a system message, in front of the turns; None: it has no place of its own, and
            stands in front of the first user's text, with an empty line between.
        default_system: what stands there where a conversation has no system message; None: nothing.
        before_last_answer: after the last user's turn, whether its answer is there or asked for.
        one_pair: whether a conversation has one user turn and one answer at most.
        tools: how it writes tools; None: it has none.
    """

    name: str
    begin: tuple[Segment, ...]
    user: tuple[Segment, ...]
    answer: tuple[Segment, ...]
    stop: Token
    system: tuple[Segment, ...] | None = None
    default_system: str | None = None
    before_last_answer: tuple[Segment, ...] = ()
    one_pair: bool = False
    tools: Tools | None = None

    def tokens(self) -> list[str]:
        """Spellings of the special tokens that a tokenizer must have, in order."""
        places = (self.begin, self.system or (), self.user, self.before_last_answer, self.answer)
        names = [item.name for place in places for item in place if isinstance(item, Token)]
        return [name for name in dict.fromkeys(names) if name not in (BOS, EOS)]


# Images, then <bos>, then the caption; the user's text is dropped.
PLAIN = ChatTemplate(
    name="plain",
    begin=(),
    user=(Images(), Token(BOS)),
    answer=(Text(holds="said", supervised=True, opens=True), Token(EOS, supervised=True)),
    stop=Token(EOS),
    one_pair=True,
)


# The way of the Hermes models, in the words of those templates that have it.
HERMES = Tools(
    before=(
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are "
        "provided with function signatures within <tools></tools> XML tags:\n<tools>"
    ),
    after=(
        "</tools>\n\nFor each function call, return a json object with function name and arguments "
        "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    ),
    call=("<tool_call>\n", "\n</tool_call>"),
    response=("<tool_response>\n", "\n</tool_response>"),
)


def chatml(
    name: str,
    default_system: str | None = None,
    before_last_answer: tuple[Segment, ...] = (),
    tools: Tools | None = None,
) -> ChatTemplate:
    """ChatML: `<|im_start|>`, the role, what is said, `<|im_end|>`; no token begins it."""
    start, end, line = Token("<|im_start|>"), Token("<|im_end|>"), Text("\n")
    return ChatTemplate(
        name=name,
        begin=(),
        system=(start, Text(before="system\n", holds="said"), end, line),
        user=(
            start,
            Text(before="user\n", holds="said"),
            end,
            line,
            start,
            Text("assistant\n"),
        ),
        answer=(Text(holds="said", supervised=True), Token(end.name, supervised=True), line),
        stop=end,
        default_system=default_system,
        before_last_answer=before_last_answer,
        tools=tools,
    )
