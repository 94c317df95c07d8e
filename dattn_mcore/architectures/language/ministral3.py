"""Ministral 3, its text part.

Sources: `Ministral3Config` and `modeling_ministral3` of transformers; mistral-common (tokenizer
version 13) for the template.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from dattn_mcore.architectures.chat import BOS, EOS, ChatTemplate, Text, Token
from dattn_mcore.architectures.features import TextFeatures
from dattn_mcore.architectures.records import Breach, HfConfig, LanguageModel
from dattn_mcore.architectures.rope import one_rope_from_hf, one_rope_to_hf
from dattn_mcore.architectures.shared_rules import WINDOWS, check_stated, one_window, rope_kinds
from dattn_mcore.architectures.sizes import LlmConfig

KINDS = ("yarn",)
# <bos> <[SYSTEM_PROMPT]> "s" <[/SYSTEM_PROMPT]> then, per pair of turns:
#   <[INST]> "u" <[/INST]> {"a" <eos>}
# No spaces, unlike version 3. Versions 7 (Mistral Small 3) and 11 are the same without tools. The
# system prompts that the published models' Jinja puts where there is none are left out, as by
# mistral-common.
CHAT = ChatTemplate(
    name="mistral_tekken",
    begin=(Token(BOS),),
    system=(Token("[SYSTEM_PROMPT]"), Text(holds="said"), Token("[/SYSTEM_PROMPT]")),
    user=(Token("[INST]"), Text(holds="said"), Token("[/INST]")),
    answer=(Text(holds="said", supervised=True), Token(EOS, supervised=True)),
    stop=Token(EOS),
)


def breaches(llm: LlmConfig) -> Iterator[Breach]:
    """Values that `Ministral3Config` cannot hold."""
    yield from one_window(llm)
    yield from rope_kinds(llm, KINDS)


def to_hf(llm: LlmConfig) -> dict[str, Any]:
    """Fields of `Ministral3Config`; transformers wants the stretched length beside the factor."""
    fields = one_rope_to_hf(llm)
    fields["rope_parameters"]["llama_4_scaling_beta"] = llm.rope.query_scale_beta
    return {
        **fields,
        "max_position_embeddings": round(llm.rope.factor * llm.rope.original_length),
        "sliding_window": llm.window_of(0),
    }


def from_hf(config: HfConfig) -> dict[str, Any]:
    """Values of `LlmConfig`."""
    check_stated(config, hidden_act="silu")
    sizes = one_rope_from_hf(config, KINDS)
    beta = float(config.rope_parameters.get("llama_4_scaling_beta") or 0)
    sizes["rope"] = replace(sizes["rope"], query_scale_beta=beta)
    return {**sizes, "sliding_window": config.sliding_window}


ARCHITECTURE = LanguageModel(
    name="ministral3",
    title="Ministral 3",
    model_type="ministral3",
    features=TextFeatures(),
    chat=CHAT,
    to_hf=to_hf,
    from_hf=from_hf,
    max_positions=262144,
    holds=(*WINDOWS, "rope"),
    breaches=breaches,
)
