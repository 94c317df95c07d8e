"""The whole Megatron-Core model against Hugging Face's own language models.

Baseline mode must be a stock causal language model over `[visual; text]` embeddings; text-only
input must give the language model's logits in every mode. Random weights, written across by hand
here, so that neither the converter nor the attention code is shared. Bound: 1e-4 in fp32.
"""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from dattn_mcore.architectures import language_models
from dattn_mcore.config.load import merge
from tests.distributed.model_jobs import model_outputs
from tests.distributed.small_models import (
    GEMMA,
    GEMMA3,
    LLAMA,
    MINISTRAL3,
    OLMO2,
    QWEN2,
    QWEN3,
    SMALL_MODEL,
    SMOLLM3,
)

MISTRAL = {"llm": {"sliding_window": None}}
WINDOWED_MISTRAL = {"llm": {"sliding_window": 7}}
BASELINE = {"v2v": "causal", "t2v_position": "rope"}
VOCABULARY = 320


def tree_of(model, attention):
    return {"model": merge(SMALL_MODEL, model), "attention": attention}


def hugging_face_model(model, weights):
    llm = merge(SMALL_MODEL, model)["llm"]
    common = dict(
        vocab_size=VOCABULARY,
        hidden_size=llm["hidden_size"],
        intermediate_size=llm["ffn_hidden_size"],
        num_hidden_layers=llm["num_layers"],
        num_attention_heads=llm["num_attention_heads"],
        num_key_value_heads=llm["num_query_groups"],
        head_dim=llm["head_dim"],
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    family = model.get("family", "mistral")
    if family == "mistral":
        config = MistralConfig(**common, sliding_window=llm["sliding_window"], rope_parameters=rope)
    elif family == "gemma2":
        config = Gemma2Config(
            **common,
            attn_logit_softcapping=llm["attention_softcap"],
            final_logit_softcapping=llm["final_softcap"],
            query_pre_attn_scalar=int(llm["query_scale"]),
            sliding_window=llm["sliding_window"],
        )
    elif family == "gemma3":
        config = Gemma3TextConfig(
            **common,
            query_pre_attn_scalar=int(llm["query_scale"]),
            sliding_window=llm["sliding_window"],
            layer_types=[
                "sliding_attention",
                "sliding_attention",
                "full_attention",
                "sliding_attention",
            ],
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        )
    elif family == "llama":
        stretched = {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
        config = LlamaConfig(**common, rope_parameters=stretched)
    elif family == "ministral3":
        stretched = {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 1.0,
            "beta_slow": 0.02,
            "truncate": False,
            "attention_factor": 1.3,
            "llama_4_scaling_beta": 0.4,
        }
        config = Ministral3Config(**common, rope_parameters=stretched)
    elif family == "smollm3":  # every fourth layer is not rotated, by default
        config = SmolLM3Config(**common, rope_parameters=rope, pad_token_id=None)
    else:
        others = {"olmo2": Olmo2Config, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
        config = others[family](**common, rope_parameters=rope)
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    hf.load_state_dict(translate(weights, llm), strict=True)
    return hf.eval()


def translate(weights, llm):
    """Our parameter names and layouts to Hugging Face's, by hand."""
    out = {"model.embed_tokens.weight": weights["embedding.word_embeddings.weight"][:VOCABULARY]}
    head = weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"])
    out["lm_head.weight"] = head[:VOCABULARY]
    out["model.norm.weight"] = weights["decoder.final_layernorm.weight"]
    for i in range(llm["num_layers"]):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        out[theirs + "self_attn.q_proj.weight"] = weights[ours + "self_attention.linear_q.weight"]
        kv = weights[ours + "self_attention.linear_kv.weight"]
        kv = kv.view(llm["num_query_groups"], 2, llm["head_dim"], -1)
        out[theirs + "self_attn.k_proj.weight"] = kv[:, 0].flatten(0, 1)
        out[theirs + "self_attn.v_proj.weight"] = kv[:, 1].flatten(0, 1)
        for name, part in (("k", 0), ("v", 1)):
            if ours + "self_attention.linear_kv.bias" in weights:
                bias = weights[ours + "self_attention.linear_kv.bias"]
                bias = bias.view(llm["num_query_groups"], 2, llm["head_dim"])[:, part].flatten()
                out[theirs + f"self_attn.{name}_proj.bias"] = bias
        for name, key in (
            ("q_proj.bias", "linear_q.bias"),
            ("q_norm.weight", "q_layernorm.weight"),
            ("k_norm.weight", "k_layernorm.weight"),
        ):
            if ours + f"self_attention.{key}" in weights:
                out[theirs + f"self_attn.{name}"] = weights[ours + f"self_attention.{key}"]
        out[theirs + "self_attn.o_proj.weight"] = weights[
            ours + "self_attention.linear_proj.weight"
        ]
        gate, up = weights[ours + "mlp.linear_fc1.weight"].chunk(2)
        out[theirs + "mlp.gate_proj.weight"], out[theirs + "mlp.up_proj.weight"] = gate, up
        out[theirs + "mlp.down_proj.weight"] = weights[ours + "mlp.linear_fc2.weight"]
        behind = ours + "mlp.linear_fc2.post_norm.weight" in weights
        before_mlp = "pre_feedforward_layernorm" if behind else "post_attention_layernorm"
        for name, key in (
            ("input_layernorm", "input_layernorm"),
            (before_mlp, "pre_mlp_layernorm"),
            ("post_attention_layernorm", "self_attention.linear_proj.post_norm"),
            ("post_feedforward_layernorm", "mlp.linear_fc2.post_norm"),
        ):
            if ours + f"{key}.weight" in weights:
                out[theirs + f"{name}.weight"] = weights[ours + f"{key}.weight"]
    return out


def hugging_face_logits(hf, layout, text_ids, visual, scale):
    """Logits of the text rows of one sample, rows in reading order."""
    text = hf.get_input_embeddings()(text_ids)
    raw = hf.get_input_embeddings().weight[text_ids]
    if not torch.equal(text, raw):  # this release scales inside the embedding
        visual = visual * scale
    rows, is_text, v, t = [], [], 0, 0
    for is_visual, n in layout:
        rows.append(visual[v : v + n] if is_visual else text[t : t + n])
        is_text += [not is_visual] * n
        v, t = v + n * is_visual, t + n * (not is_visual)
    with torch.no_grad():
        logits = hf(inputs_embeds=torch.cat(rows)[None]).logits[0]
    return logits[torch.tensor(is_text)]


def compare(pool, model, attention, layouts, world_size=1, parallel=None):
    tree = tree_of(model, attention)
    if parallel:
        tree["parallel"] = parallel
    *_, result = pool.run(model_outputs, world_size, tree, layouts)
    weights = pool.run(model_outputs, 1, tree_of(model, attention), layouts)[0]["weights"]
    hf = hugging_face_model(model, weights)
    scale = merge(SMALL_MODEL, model)["llm"]["hidden_size"] ** 0.5
    t = v = 0
    spread = []
    for layout in layouts:
        texts = sum(n for is_visual, n in layout if not is_visual)
        visuals = sum(n for is_visual, n in layout if is_visual)
        expected = hugging_face_logits(
            hf,
            layout,
            result["text_ids"][t : t + texts],
            result["visual_rows"][v : v + visuals],
            scale,
        )
        actual = result["logits"][t : t + texts, :VOCABULARY]
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
        spread.append(expected.std())
        t, v = t + texts, v + visuals
    assert min(spread) > 0.05  # logits that are all alike would prove nothing


IMAGE_FIRST = (((True, 16), (False, 9)), ((True, 32), (False, 5)))
INTERLEAVED = (((False, 4), (True, 16), (False, 6), (True, 16), (False, 3)),)
TEXT_ONLY = (((False, 12),), ((False, 5),))
LAYOUTS = {
    "sp-tp2-pp2": {"tp": 2, "pp": 2, "sp": True},
    "tp2": {"tp": 2},
    "tp2-sp": {"tp": 2, "sp": True},
    "pp2": {"pp": 2},
}


FAMILIES = {
    "mistral": MISTRAL,
    "gemma2": GEMMA,
    "gemma3": GEMMA3,
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "ministral3": MINISTRAL3,
    "smollm3": SMOLLM3,
    "olmo2": OLMO2,
}
WINDOWED = {"windowed": WINDOWED_MISTRAL}
PARALLEL = {**WINDOWED, **{name: FAMILIES[name] for name in FAMILIES if name != "mistral"}}
# Every family as the baseline, and in the other modes those whose layers differ in the most ways;
# `test_convert_real_models.py` has text of every family in D-Attn's own mode.
MODES = {"dattn": {}, "sum": {"merge": "sum"}, "baseline": BASELINE}
TEXT_CASES = [(family, "baseline") for family in FAMILIES]
TEXT_CASES += [(family, mode) for family in ("gemma2", "gemma3") for mode in ("dattn", "sum")]
TEXT_CASES += [("ministral3", "dattn"), ("ministral3", "sum")]


def test_no_family_is_left_out():
    assert set(FAMILIES) == set(language_models())


@pytest.mark.parametrize("layouts", [IMAGE_FIRST, INTERLEAVED], ids=["first", "interleaved"])
@pytest.mark.parametrize(
    "model", [*FAMILIES.values(), WINDOWED_MISTRAL], ids=[*FAMILIES, *WINDOWED]
)
def test_baseline_equals_hugging_face(pool, model, layouts):
    compare(pool, model, BASELINE, layouts)


@pytest.mark.parametrize(("family", "mode"), TEXT_CASES)
def test_text_only_equals_hugging_face(pool, family, mode):
    compare(pool, FAMILIES[family], MODES[mode], TEXT_ONLY)


@pytest.mark.parametrize("model", PARALLEL.values(), ids=PARALLEL)
@pytest.mark.parametrize("parallel", LAYOUTS.values(), ids=LAYOUTS)
def test_baseline_in_parallel_equals_hugging_face(pool, model, parallel):
    ranks = parallel.get("tp", 1) * parallel.get("pp", 1)
    compare(pool, model, BASELINE, IMAGE_FIRST, ranks, parallel)


def test_dattn_differs_from_baseline(pool):
    """The oracle tests would not see a mode switch that does nothing."""
    results = [
        pool.run(model_outputs, 1, tree_of(MISTRAL, attention), IMAGE_FIRST)[0]["logits"]
        for attention in ({}, {"merge": "sum"}, {"v2v": "causal"}, BASELINE)
    ]
    for i, first in enumerate(results):
        for second in results[i + 1 :]:
            assert (first - second).abs().max() > 1e-3


def test_an_image_does_not_change_text_before_it(pool):
    layouts = INTERLEAVED
    first, second = (
        pool.run(model_outputs, 1, tree_of(MISTRAL, {}), layouts, changed_tile)[0]["logits"]
        for changed_tile in (None, 1)
    )
    before = 4 + 6  # text rows before the second image
    assert torch.equal(first[:before], second[:before])
    assert (first[before:13] - second[before:13]).abs().max() > 1e-3


def test_a_sample_does_not_change_its_neighbours(pool):
    layouts = (*IMAGE_FIRST, *INTERLEAVED)
    first, second = (
        pool.run(model_outputs, 1, tree_of(MISTRAL, {}), layouts, changed_tile)[0]["logits"]
        for changed_tile in (None, 0)
    )
    assert (first[:9] - second[:9]).abs().max() > 1e-3
    assert torch.equal(first[9:], second[9:])
