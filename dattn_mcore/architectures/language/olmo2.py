"""OLMo 2: norms stand behind attention and MLP, not before them; queries and keys are normed whole.

Sources: `Olmo2Config` and `modeling_olmo2` of transformers; the chat template of the published
instruct models, which leave the new line behind the last answer out. In bf16 its norms scale before
they round; exported code rounds before it scales, as it does for all families whose gammas are not
zero-centred.
"""

from __future__ import annotations

from typing import Any

from dattn_mcore.architectures.chat import BOS, EOS, ChatTemplate, Text, Token
from dattn_mcore.architectures.features import LayerNorms, TextFeatures
from dattn_mcore.architectures.records import HfConfig, LanguageModel
from dattn_mcore.architectures.rope import one_rope_from_hf, one_rope_to_hf
from dattn_mcore.architectures.shared_rules import check_stated
from dattn_mcore.architectures.sizes import LlmConfig

# <bos> then, per pair of turns:  "<|user|>\nu\n<|assistant|>\n" {"a" <eos>} "\n"
# The roles' names are text: its tokenizer has no tokens of theirs.
CHAT = ChatTemplate(
    name="olmo2",
    begin=(Token(BOS),),
    system=(Text(before="<|system|>\n", holds="said", after="\n"),),
    user=(Text(before="<|user|>\n", holds="said", after="\n<|assistant|>\n"),),
    answer=(Text(holds="said", supervised=True), Token(EOS, supervised=True), Text("\n")),
    stop=Token(EOS),
)


def to_hf(llm: LlmConfig) -> dict[str, Any]:
    """Fields of `Olmo2Config`."""
    return one_rope_to_hf(llm)


def from_hf(config: HfConfig) -> dict[str, Any]:
    """Values of `LlmConfig`."""
    check_stated(config, hidden_act="silu", attention_bias=False)
    return one_rope_from_hf(config)


ARCHITECTURE = LanguageModel(
    name="olmo2",
    title="OLMo 2",
    model_type="olmo2",
    features=TextFeatures(
        norms=LayerNorms(
            attention_output="post_attention_layernorm",
            mlp_output="post_feedforward_layernorm",
        ),
        qk_norm=("heads", "head_dim"),
    ),
    chat=CHAT,
    to_hf=to_hf,
    from_hf=from_hf,
    max_positions=4096,
)
