"""Llama 3, 3.1, 3.2 (text) and 3.3.

Sources: `LlamaConfig` and `modeling_llama` of transformers; the prompt format of Meta's
llama-models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dattn_mcore.architectures.chat import BOS, ChatTemplate, Text, Token
from dattn_mcore.architectures.features import TextFeatures
from dattn_mcore.architectures.records import Breach, HfConfig, LanguageModel
from dattn_mcore.architectures.rope import one_rope_from_hf, one_rope_to_hf
from dattn_mcore.architectures.shared_rules import check_stated, rope_kinds, whole_heads
from dattn_mcore.architectures.sizes import LlmConfig

KINDS = ("default", "llama3")
_START, _END, _STOP = Token("<|start_header_id|>"), Token("<|end_header_id|>"), Token("<|eot_id|>")
# <bos> then, per turn:  <start> "user" <end> "\n\nu" <eot>, and an answer's {"a" <eot>} likewise.
# The knowledge cutoff and date that templates of Llama 3.1 write into a system message are none of
# the format's, and are left out.
CHAT = ChatTemplate(
    name="llama3",
    begin=(Token(BOS),),
    system=(_START, Text("system"), _END, Text(before="\n\n", holds="said"), _STOP),
    user=(
        _START,
        Text("user"),
        _END,
        Text(before="\n\n", holds="said"),
        _STOP,
        _START,
        Text("assistant"),
        _END,
        Text("\n\n"),
    ),
    answer=(Text(holds="said", supervised=True), Token(_STOP.name, supervised=True)),
    stop=_STOP,
)


def breaches(llm: LlmConfig) -> Iterator[Breach]:
    """Values that `LlamaConfig` cannot hold."""
    yield from whole_heads(llm)
    yield from rope_kinds(llm, KINDS)


def to_hf(llm: LlmConfig) -> dict[str, Any]:
    """Fields of `LlamaConfig`."""
    return one_rope_to_hf(llm)


def from_hf(config: HfConfig) -> dict[str, Any]:
    """Values of `LlmConfig`."""
    check_stated(config, hidden_act="silu", attention_bias=False, mlp_bias=False)
    return one_rope_from_hf(config, KINDS)


ARCHITECTURE = LanguageModel(
    name="llama",
    title="Llama 3",
    model_type="llama",
    features=TextFeatures(),
    chat=CHAT,
    to_hf=to_hf,
    from_hf=from_hf,
    max_positions=131072,
    holds=("rope",),
    breaches=breaches,
)
