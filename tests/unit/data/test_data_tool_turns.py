"""Tools by a template's rule: the text of the models' own templates, or a refusal that names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dattn_mcore.data.record_runs import runs_of
from dattn_mcore.data.sources.records.forms import FORMS, parse_record
from dattn_mcore.data.templates import encode_sample
from dattn_mcore.data.tokenizer import HuggingFaceTokenizer
from dattn_mcore.errors import DataError
from tests.unit.data.test_data_chat_families import make_byte_level

_TOOLS = (
    r"# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are "
    r"provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_HOW = (
    r"\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    r"within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, "
    r"\"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n"
)
_RESPONSE = r"""
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}{{- message.content }}{{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}"""
# Source: tokenizer_config.json of Qwen/Qwen2.5-7B-Instruct.
QWEN25 = (
    r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}
    {%- else %}{{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
    {{- "\n\n"""
    + _TOOLS
    + r"""" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- """
    + f'"{_HOW}"'
    + r""" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- set tool_call = tool_call.function %}
            {{- '\n<tool_call>\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}"""
    + _RESPONSE
)
# Source: tokenizer_config.json of Qwen/Qwen3-8B, for messages without thoughts.
QWEN3 = (
    r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- """
    + f'"{_TOOLS}"'
    + r""" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- """
    + f'"{_HOW}"'
    + r""" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {%- if loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
        {{- message.content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and message.content) or (not loop.first) %}{{- '\n' }}{%- endif %}
            {%- set tool_call = tool_call.function %}
            {{- '<tool_call>\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}"""
    + _RESPONSE
)
TOOLS = [
    {"type": "function", "function": {"name": "sky", "description": "Wetter für é"}},
    {"type": "function", "function": {"name": "sea", "parameters": {"b": 1, "a": [2, "x"]}}},
]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def talk(system: str, said: str) -> list[dict[str, Any]]:
    """A question, two calls, their responses, another call, an answer, and a second question."""
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "digit?"},
        {"role": "assistant", "content": said, "tool_calls": [call("sky", at="é"), call("sea")]},
        {"role": "tool", "content": "us 7"},
        {"role": "tool", "content": '{"a": 1}'},
        {"role": "assistant", "content": "", "tool_calls": [call("sea", a=[1, {"b": None}])]},
        {"role": "tool", "content": "8"},
        {"role": "assistant", "content": "dig"},
        {"role": "user", "content": "us?"},
        {"role": "assistant", "content": "7"},
    ]
    return [{"role": "system", "content": system}, *turns] if system else turns


@pytest.mark.parametrize("template", ["chatml", "qwen3"])
@pytest.mark.parametrize("system", ["", "Be short."])
@pytest.mark.parametrize("said", ["", "one moment"])
def test_ids_are_those_of_the_models_own_template(
    tmp_path: Path, template: str, system: str, said: str
) -> None:
    tokenizer = HuggingFaceTokenizer(make_byte_level(tmp_path, template))
    backend: PreTrainedTokenizerFast = tokenizer._model
    messages = talk(system, said)
    own = QWEN25 if template == "chatml" else QWEN3
    expected = backend.apply_chat_template(
        messages, tools=TOOLS, chat_template=own, return_dict=False
    )
    record = json.loads(json.dumps({"messages": messages, "tools": TOOLS}))
    sample = parse_record(record, "a", form=FORMS["messages"])
    encoded = encode_sample(runs_of(tokenizer, template, sample), 4)
    assert list(encoded.text_ids) == list(expected)
    learned = tokenizer.decode([label for label in encoded.labels if label != -100])
    assert learned.count('<tool_call>\n{"name": ') == 3 and learned.endswith("dig7")
    assert "us 7" not in learned and "<tool_response>" not in learned


@pytest.mark.parametrize("template", ["mistral", "plain", "gemma", "llama3"])
def test_a_template_without_tools_names_those_that_have_them(tmp_path: Path, template: str) -> None:
    record = {"messages": talk("", ""), "tools": TOOLS}
    sample = parse_record(record, "a", form=FORMS["messages"])
    tokenizer = HuggingFaceTokenizer(make_byte_level(tmp_path, "llama3"))
    with pytest.raises(DataError) as raised:
        runs_of(tokenizer, template, sample)
    assert str(raised.value) == (
        f"the record uses tools, and data.template '{template}' has no place for them; use a "
        "template that has (chatml, qwen3), or write tools, calls and responses into the texts of "
        "user and assistant turns as the model's own template does"
    )


def test_an_image_in_a_response_is_seen(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(make_byte_level(tmp_path, "qwen3"))
    messages = talk("", "")
    messages[2]["content"] = [{"type": "text", "text": "here: "}, {"type": "image", "path": "1"}]
    sample = parse_record({"messages": messages}, "a", form=FORMS["messages"])
    assert sample.images == ("1",)
    encoded = encode_sample(runs_of(tokenizer, "qwen3", sample), 4)
    assert encoded.image_rows == (4,) and len(encoded.layout) == 3
