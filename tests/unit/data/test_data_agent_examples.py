"""ms-swift's agent examples: read and written to the text that its page prints for them.

Source: `docs/source_en/Instruction/Agent-support.md`, template qwen2_5 with agent_template hermes.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from dattn_mcore.data.record_runs import runs_of
from dattn_mcore.data.sources.records.forms import FORMS, WIDENED, parse_record
from dattn_mcore.data.templates import encode_sample
from dattn_mcore.data.tokenizer import HuggingFaceTokenizer
from dattn_mcore.errors import DataError
from tests.unit.data.shapes_messages import CLICKS, OPENED, PARALLEL
from tests.unit.data.test_data_chat_families import make_byte_level

HOW = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
%s
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
"""
CALLS = """<tool_call>
{"name": "realtime_aqi", "arguments": {"city": "Beijing"}}
</tool_call>
<tool_call>
{"name": "realtime_aqi", "arguments": {"city": "Shanghai"}}
</tool_call><|im_end|>"""
POLLUTED = (
    "According to the weather forecast tool, the air quality index (AQI) in Beijing is 10, which "
    "indicates good air quality; whereas in Shanghai, the AQI is 72, indicating mild pollution."
    "<|im_end|>"
)
FIRST = (
    """<|im_start|>system
You are Qwen, created by Alibaba Cloud. You are a helpful assistant.

"""
    + HOW % PARALLEL["tools"][1:-1]
    + f"""<|im_start|>user
What is the weather like in Beijing and Shanghai today?<|im_end|>
<|im_start|>assistant
{CALLS}
<|im_start|>user
<tool_response>
{{"city": "Beijing", "aqi": "10", "unit": "celsius"}}
</tool_response>
<tool_response>
{{"city": "Shanghai", "aqi": "72", "unit": "fahrenheit"}}
</tool_response><|im_end|>
<|im_start|>assistant
{POLLUTED}
"""
)
THOUGHT = """<think>
I can check the current time by opening the calendar app.
</think>
<tool_call>
{"name": "click", "arguments": {"x": 105, "y": 132}}
</tool_call><|im_end|>"""
# What stands for the images in that text is left out: here images are no text.
SECOND = (
    """<|im_start|>system
You are a helpful assistant.

"""
    + HOW % CLICKS["tools"][1:-1]
    + f"""<|im_start|>user
What time is it now?<|im_end|>
<|im_start|>assistant
{THOUGHT}
<|im_start|>user
<tool_response>
{{"images": "", "status": "success"}}
</tool_response><|im_end|>
<|im_start|>assistant
{OPENED}<|im_end|>
"""
)
SYSTEM = "You are a helpful assistant."
CALL = {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'}
SAID = {"role": "assistant", "content": "b"}
ASKED = {"role": "user", "content": "a"}
RESPONSE = {"role": "tool_response", "content": "{}"}


@pytest.mark.parametrize(
    ("record", "text", "learned"),
    [
        (PARALLEL, FIRST, CALLS + POLLUTED),
        ({**CLICKS, "system": SYSTEM}, SECOND, f"{THOUGHT}{OPENED}<|im_end|>"),
    ],
)
@pytest.mark.parametrize("response", ["tool_response", "tool"])
@pytest.mark.parametrize("form", [FORMS["swift"], WIDENED["messages"]])
def test_the_text_is_that_of_the_page(
    tmp_path: Path, record: dict[str, Any], text: str, learned: str, response: str, form: Any
) -> None:
    tokenizer = HuggingFaceTokenizer(make_byte_level(tmp_path, "chatml"))
    record = copy.deepcopy(record)
    for message in record["messages"]:
        if message["role"] == "tool_response":
            message["role"] = response
    sample = parse_record(record, "a", form=form)
    encoded = encode_sample(runs_of(tokenizer, "chatml", sample), 4)
    expected = tokenizer._model(text, add_special_tokens=False).input_ids
    assert list(encoded.text_ids) == expected
    labels = [label for label in encoded.labels if label != -100]
    assert labels == tokenizer._model(learned, add_special_tokens=False).input_ids
    assert encoded.image_rows == (4,) * len(record.get("images", []))


def test_the_second_image_stands_in_its_response(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(make_byte_level(tmp_path, "chatml"))
    sample = parse_record({**CLICKS, "system": SYSTEM}, "a", form=FORMS["swift"])
    layout = encode_sample(runs_of(tokenizer, "chatml", sample), 4).layout
    before = [
        len(tokenizer._model(SECOND.partition(cut)[0], add_special_tokens=False).input_ids)
        for cut in ("What time", '", "status"')
    ]
    texts = [rows for is_visual, rows in layout if not is_visual]
    assert [texts[0], texts[0] + texts[1]] == before


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (
            [ASKED, CALL, SAID, RESPONSE, SAID],
            "message 2 is from 'assistant' and says something behind the call of a tool; an answer "
            "says it before its calls, or after their responses",
        ),
        (
            [ASKED, {**SAID, "loss": False}, CALL, RESPONSE, SAID],
            "messages 1 and 2 are one answer, and 'loss' differs; give both the same",
        ),
        (
            [ASKED, CALL, CALL, ASKED, SAID],
            "message 3 is from 'user', and the call of a tool before it has no response",
        ),
        (
            [CALL, RESPONSE, SAID],
            "message 0 is from 'tool_call' where 'user' is due; messages alternate, user first",
        ),
    ],
)
def test_what_no_answer_can_hold_is_refused(messages: list[Any], reason: str) -> None:
    with pytest.raises(DataError) as raised:
        parse_record({"messages": messages}, "a", form=FORMS["swift"])
    assert str(raised.value) == reason


def test_neighbouring_answers_are_one_where_tools_are_called() -> None:
    """As the page says; in a conversation without calls they are a fault of the record."""
    end = {"role": "assistant", "content": "c"}
    record = {"messages": [ASKED, CALL, RESPONSE, SAID, end]}
    sample = parse_record(record, "a", form=FORMS["swift"])
    assert sample.turns == ("a", "", "", "bc")
    with pytest.raises(DataError, match="message 2 is from 'assistant' where 'user' is due"):
        parse_record({"messages": [ASKED, SAID, end]}, "a", form=WIDENED["messages"])
    assert json.loads(sample.tool_use.calls[0][0]) == {"name": "f", "arguments": {}}  # type: ignore[union-attr]
