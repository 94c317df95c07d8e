"""Shapes of `messages`, ms-swift and LLaMA-Factory's alpaca."""

from __future__ import annotations

from typing import Any

from dattn_mcore.data.sources.record import Inside, ToolUse
from tests.unit.data.shapes import URI, Shape, png, sample
from tests.unit.data.shapes_llava import FACTORY

OPENAI = "OpenAI, fine-tuning guide"
TRL = "TRL, `dataset_formats.md`"
HF = "transformers, chat templates of multimodal models"
SWIFT = "ms-swift, `Custom-dataset.md`"
USER = {"role": "user", "content": "Hello"}
BOT = {"role": "assistant", "content": "Hi!"}
SHOWN = {"role": "user", "content": "<image>What?"}
CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
TOOL_TEXT = '{"type": "function", "function": {"name": "weather", "parameters": {}}}'
URI_DATA = URI.partition(",")[2]
USED = ToolUse(tools=(TOOL_TEXT,), calls=((CALL,), ()), responses=((), ("blue",)))
AGENT = "ms-swift, `Agent-support.md`"
AQI = '{"name": "realtime_aqi", "arguments": {"city": "%s"}}'
AIR = '{"city": "%s", "aqi": "%s", "unit": "%s"}'
CITY = '{"type": "string", "description": "City name, e.g., Shanghai"}'
AQI_TOOL = (
    '{"type": "function", "function": {"name": "realtime_aqi", "description": "Weather forecast. '
    'Get real-time air quality, including current air quality, PM2.5, and PM10 information.", '
    f'"parameters": {{"type": "object", "properties": {{"city": {CITY}}}, "required": ["city"]}}}}}}'
)
PARALLEL: dict[str, Any] = {
    "tools": f"[{AQI_TOOL}]",
    "messages": [
        {"role": "user", "content": "What is the weather like in Beijing and Shanghai today?"},
        {"role": "tool_call", "content": AQI % "Beijing"},
        {"role": "tool_call", "content": AQI % "Shanghai"},
        {"role": "tool_response", "content": AIR % ("Beijing", 10, "celsius")},
        {"role": "tool_response", "content": AIR % ("Shanghai", 72, "fahrenheit")},
        {
            "role": "assistant",
            "content": "According to the weather forecast tool, the air quality index (AQI) in "
            "Beijing is 10, which indicates good air quality; whereas in Shanghai, the AQI is 72, "
            "indicating mild pollution.",
        },
    ],
}
OPENED = "Successfully opened the calendar app. The current time is 11 o'clock in the morning."
CLICKS: dict[str, Any] = {
    "tools": '[{"type": "function", "function": {"name": "click", "description": "Click on a '
    'position on the screen", "parameters": {"type": "object", "properties": {"x": {"type": '
    '"integer", "description": "X-coordinate representing the horizontal position on the screen"}, '
    '"y": {"type": "integer", "description": "Y-coordinate representing the vertical position on '
    'the screen"}}, "required": ["x", "y"]}}}]',
    "messages": [
        {"role": "user", "content": "<image>What time is it now?"},
        {
            "role": "assistant",
            "content": "<think>\nI can check the current time by opening the calendar app.\n"
            "</think>\n",
        },
        {"role": "tool_call", "content": '{"name": "click", "arguments": {"x": 105, "y": 132}}'},
        {"role": "tool_response", "content": '{"images": "<image>", "status": "success"}'},
        {"role": "assistant", "content": OPENED},
    ],
    "images": ["desktop.png", "calendar.png"],
}


def parts(*content: dict[str, object]) -> list[dict[str, object]]:
    """A question of typed parts, and its answer."""
    return [{"role": "user", "content": list(content)}, BOT]


WHAT = {"type": "text", "text": "What?"}
PLACE = {"type": "image"}

SHAPES = (
    Shape(
        "LLaMA-Factory, `mllm_demo.json`",
        FACTORY,
        "a.json",
        [
            {
                "messages": [{"role": "user", "content": "<image>Who?"}, BOT, USER, BOT],
                "images": ["mllm_demo_data/1.jpg"],
            }
        ],
        "messages",
        (sample("a.json[0]", ("<image>Who?", "Hi!", "Hello", "Hi!"), ("mllm_demo_data/1.jpg",)),),
    ),
    Shape(
        "OpenAI fine-tuning, text",
        OPENAI,
        "a.jsonl",
        [{"messages": [{"role": "system", "content": "Be short."}, USER, BOT]}],
        "messages",
        (sample("a.jsonl:1", ("Hello", "Hi!"), system="Be short."),),
    ),
    Shape(
        "OpenAI fine-tuning, an answer of weight 0",
        OPENAI,
        "a.jsonl",
        [{"messages": [USER, {**BOT, "weight": 0}, USER, {**BOT, "weight": 1}]}],
        "messages",
        (sample("a.jsonl:1", ("Hello", "Hi!", "Hello", "Hi!"), learned=(False, True)),),
    ),
    Shape(
        "OpenAI vision fine-tuning, image as a data URI",
        OPENAI,
        "a.jsonl",
        [{"messages": parts(WHAT, {"type": "image_url", "image_url": {"url": URI}})}],
        "messages",
        (
            sample(
                "a.jsonl:1",
                ("What?<image>", "Hi!"),
                (Inside("an image in message 0, part 1: 'image_url'", URI_DATA),),
            ),
        ),
    ),
    Shape(
        "OpenAI vision fine-tuning, image as a URL",
        OPENAI,
        "a.jsonl",
        [{"messages": parts({"type": "image_url", "image_url": {"url": "https://a.b/c.jpg"}})}],
        refused=(
            "message 0, part 0: 'image_url' is the URL 'https://a.b/c.jpg'; nothing is downloaded "
            "in training: download the images and give their paths"
        ),
    ),
    Shape(
        "OpenAI fine-tuning, tools",
        OPENAI,
        "a.jsonl",
        [
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {
                                "id": "c1",
                                "type": "function",
                                "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
                            }
                        ],
                    },
                    {"role": "tool", "tool_call_id": "c1", "content": "blue"},
                    BOT,
                ],
                "tools": [TOOL],
            }
        ],
        "messages",
        (sample("a.jsonl:1", ("Hello", "", "", "Hi!"), tool_use=USED),),
    ),
    Shape(
        "Hugging Face messages, paths in typed parts",
        HF,
        "a.jsonl",
        [{"messages": parts({"type": "image", "path": "1.png"}, WHAT)}],
        "messages",
        (sample("a.jsonl:1", ("<image>What?", "Hi!"), ("1.png",)),),
    ),
    Shape(
        "Hugging Face messages, `image` in typed parts",
        HF,
        "a.jsonl",
        [{"messages": parts({"type": "image", "image": "1.png"}, WHAT)}],
        "messages",
        (sample("a.jsonl:1", ("<image>What?", "Hi!"), ("1.png",)),),
    ),
    Shape(
        "TRL, typed parts and `images`, parquet",
        TRL,
        "a.parquet",
        [
            {
                "messages": parts({**PLACE, "text": None}, WHAT)[:1]
                + [{"role": "assistant", "content": [{"type": "text", "text": "Hi!"}]}],
                "images": [{"bytes": png(), "path": "1.png"}],
            }
        ],
        "messages",
        (sample("a-0", ("<image>What?", "Hi!"), (Inside("1.png", 0),)),),
    ),
    Shape(
        "TRL, texts and `images`",
        TRL,
        "a.jsonl",
        [{"messages": [{"role": "user", "content": "What?"}, BOT], "images": ["1.png"]}],
        "messages",
        (sample("a.jsonl:1", ("<image>What?", "Hi!"), ("1.png",)),),
    ),
    Shape(
        "TRL, prompt and completion",
        TRL,
        "a.jsonl",
        [{"prompt": [USER, BOT, SHOWN], "completion": [BOT], "images": ["1.png"]}],
        "messages",
        (
            sample(
                "a.jsonl:1",
                ("Hello", "Hi!", "<image>What?", "Hi!"),
                ("1.png",),
                learned=(False, True),
            ),
        ),
    ),
    Shape(
        "TRL, preferences",
        TRL,
        "a.jsonl",
        [{"prompt": [USER], "chosen": [BOT], "rejected": [BOT]}],
        refused=(
            "data.sources[0].annotations: '{path}' line 1 (index 0) has the keys 'prompt', "
            "'chosen', 'rejected', which is no form that is known; set format: or mapping: of the "
            "source in data.sources (docs/data.md)"
        ),
    ),
    Shape(
        "TRL, language modelling",
        TRL,
        "a.jsonl",
        [{"text": "The sky is blue."}],
        refused=(
            "data.sources[0].annotations: '{path}' line 1 (index 0) has the keys 'text', which is "
            "no form that is known; set format: or mapping: of the source in data.sources "
            "(docs/data.md)"
        ),
    ),
    Shape(
        "UltraChat 200k, `prompt` beside the messages, parquet",
        "ultrachat_200k's data set card",
        "a.parquet",
        [{"prompt": "Hello", "prompt_id": "f0e3", "messages": [USER, BOT]}],
        "messages",
        (sample("a-0", ("Hello", "Hi!"), ignored=("prompt", "prompt_id")),),
    ),
    Shape(
        "No Robots, `prompt` is the system turn",
        "no_robots's data set card",
        "a.jsonl",
        [
            {
                "prompt": "Stutter.",
                "prompt_id": "2dc7",
                "messages": [{"content": "Stutter.", "role": "system"}, USER, BOT],
                "category": "Chat",
            }
        ],
        "messages",
        (
            sample(
                "a.jsonl:1",
                ("Hello", "Hi!"),
                system="Stutter.",
                ignored=("prompt_id", "category", "prompt"),
            ),
        ),
    ),
    Shape(
        "Qwen's messages, parts without a type",
        "Qwen2.5-VL, `qwen-vl-utils`",
        "a.json",
        [{"messages": parts({"image": "1.png"}, {"text": "What?"})}],
        "messages",
        (sample("a.json[0]", ("<image>What?", "Hi!"), ("1.png",)),),
    ),
    Shape(
        "Qwen's messages, base64",
        "Qwen2.5-VL, `qwen-vl-utils`",
        "a.json",
        [{"messages": parts({**PLACE, "image": f"data:image;base64,{URI_DATA}"}, WHAT)}],
        "messages",
        (
            sample(
                "a.json[0]",
                ("<image>What?", "Hi!"),
                (Inside("an image in message 0, part 0: 'image'", URI_DATA),),
            ),
        ),
    ),
    Shape(
        "Messages with a video",
        HF,
        "a.jsonl",
        [{"messages": parts({"type": "video", "path": "1.mp4"}, WHAT)}],
        refused="message 0, part 0 is a video; only text and images are read",
    ),
    Shape(
        "Messages with sound",
        "OpenAI, chat completions",
        "a.jsonl",
        [{"messages": parts({"type": "input_audio", "input_audio": {"data": "AA"}}, WHAT)}],
        refused="message 0, part 0 is a sound; only text and images are read",
    ),
    Shape(
        "MiniCPM-V, one image",
        "MiniCPM-V, `finetune/readme.md`",
        "a.json",
        [{"id": "0", "image": "p/1.jpg", "conversations": [SHOWN, BOT]}],
        "messages",
        (sample("0", ("<image>What?", "Hi!"), ("p/1.jpg",)),),
    ),
    Shape(
        "MiniCPM-V, images by name",
        "MiniCPM-V, `finetune/readme.md`",
        "a.json",
        [
            {
                "id": "0",
                "image": {"<image_00>": "p/1.jpg", "<image_01>": "p/2.jpg"},
                "conversations": [
                    {"role": "user", "content": "Which?\n<image_01>\n<image_00>"},
                    BOT,
                ],
            }
        ],
        "messages",
        (sample("0", ("Which?\n<image>\n<image>", "Hi!"), ("p/2.jpg", "p/1.jpg")),),
    ),
    Shape(
        "ms-swift, a mark for each image",
        SWIFT,
        "a.jsonl",
        [
            {
                "messages": [{"role": "user", "content": "<image><image>Which?"}, BOT],
                "images": ["1.jpg", "2.jpg"],
            }
        ],
        "messages",
        (sample("a.jsonl:1", ("<image><image>Which?", "Hi!"), ("1.jpg", "2.jpg")),),
    ),
    Shape(
        "ms-swift, images without marks",
        SWIFT,
        "a.jsonl",
        [{"messages": [USER, BOT], "images": ["1.jpg", "2.jpg"]}],
        "messages",
        (sample("a.jsonl:1", ("<image><image>Hello", "Hi!"), ("1.jpg", "2.jpg")),),
    ),
    Shape(
        "ms-swift, loss of single answers",
        SWIFT,
        "a.jsonl",
        [{"messages": [USER, {**BOT, "loss": False}, USER, {**BOT, "loss": True}]}],
        "messages",
        (sample("a.jsonl:1", ("Hello", "Hi!", "Hello", "Hi!"), learned=(False, True)),),
    ),
    Shape(
        "ms-swift, query, response and history",
        SWIFT,
        "a.jsonl",
        [{"system": "S", "query": "Hello", "response": "Hi!", "history": [["a", "b"]]}],
        "swift",
        (sample("a.jsonl:1", ("a", "b", "Hello", "Hi!"), system="S"),),
    ),
    Shape(
        "ms-swift, a rejected answer beside",
        SWIFT,
        "a.jsonl",
        [{"messages": [USER, BOT], "rejected_response": "Go away"}],
        "swift",
        (sample("a.jsonl:1", ("Hello", "Hi!"), ignored=("rejected_response",)),),
    ),
    Shape(
        "ms-swift, tools",
        SWIFT,
        "a.jsonl",
        [
            {
                "messages": [
                    USER,
                    {"role": "tool_call", "content": CALL},
                    {"role": "tool_response", "content": "blue"},
                    BOT,
                ],
                "tools": f"[{TOOL_TEXT}]",
            }
        ],
        "swift",
        (sample("a.jsonl:1", ("Hello", "", "", "Hi!"), tool_use=USED),),
    ),
    Shape(
        "ms-swift, parallel calls of tools",
        AGENT,
        "a.jsonl",
        [PARALLEL],
        "swift",
        (
            sample(
                "a.jsonl:1",
                (PARALLEL["messages"][0]["content"], "", "", PARALLEL["messages"][5]["content"]),
                tool_use=ToolUse(
                    (PARALLEL["tools"][1:-1],),
                    ((AQI % "Beijing", AQI % "Shanghai"), ()),
                    ((), (AIR % ("Beijing", 10, "celsius"), AIR % ("Shanghai", 72, "fahrenheit"))),
                ),
            ),
        ),
    ),
    Shape(
        "ms-swift, text before a call, an image in a response",
        AGENT,
        "a.jsonl",
        [CLICKS],
        "swift",
        (
            sample(
                "a.jsonl:1",
                tuple(CLICKS["messages"][n]["content"] for n in (0, 1)) + ("", OPENED),
                ("desktop.png", "calendar.png"),
                tool_use=ToolUse(
                    (CLICKS["tools"][1:-1],),
                    ((CLICKS["messages"][2]["content"],), ()),
                    ((), (CLICKS["messages"][3]["content"],)),
                ),
            ),
        ),
    ),
    Shape(
        "ms-swift, grounding",
        SWIFT,
        "a.jsonl",
        [
            {
                "messages": [SHOWN, {"role": "assistant", "content": "<bbox>"}],
                "images": ["1.jpg"],
                "objects": {"ref": [], "bbox": [[1, 2, 3, 4]]},
            }
        ],
        refused=(
            "'objects' holds boxes of ms-swift's grounding, which are not read; only text and "
            "images are"
        ),
    ),
    Shape(
        "ms-swift, video",
        SWIFT,
        "a.jsonl",
        [{"messages": [{"role": "user", "content": "<video>What?"}, BOT], "videos": ["1.mp4"]}],
        refused="key 'videos' holds videos, which are not read yet; only text and images are",
    ),
    Shape(
        "ms-swift, sound",
        SWIFT,
        "a.jsonl",
        [{"messages": [{"role": "user", "content": "<audio>What?"}, BOT], "audios": ["1.mp3"]}],
        refused="key 'audios' holds sounds, which are not read yet; only text and images are",
    ),
    Shape(
        "LLaMA-Factory, `mllm_video_demo.json` without its `videos`",
        FACTORY,
        "a.json",
        [{"messages": [{"role": "user", "content": "<video>Who?"}, BOT]}],
        refused="a text holds the mark <video>, and video is not read yet; only text and images are",
    ),
    Shape(
        "LLaMA-Factory, alpaca",
        FACTORY,
        "a.json",
        [{"instruction": "Add.", "input": "1 and 2", "output": "3"}],
        "llama_factory",
        (sample("a.json[0]", ("Add.\n1 and 2", "3")),),
    ),
    Shape(
        "LLaMA-Factory, alpaca with history and system",
        FACTORY,
        "a.json",
        [
            {
                "instruction": "Add.",
                "input": "",
                "output": "3",
                "system": "S",
                "history": [["a", "b"]],
            }
        ],
        "llama_factory",
        (sample("a.json[0]", ("a", "b", "Add.", "3"), system="S"),),
    ),
    Shape(
        "LLaMA-Factory, alpaca with images",
        FACTORY,
        "a.json",
        [{"instruction": "<image>What?", "output": "A cat", "images": ["1.jpg"]}],
        "llama_factory",
        (sample("a.json[0]", ("<image>What?", "A cat"), ("1.jpg",)),),
    ),
)
