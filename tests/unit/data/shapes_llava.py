"""Shapes of LLaVA's form and of its kin of ShareGPT."""

from __future__ import annotations

from typing import Any

from dattn_mcore.data.sources.record import ToolUse
from tests.unit.data.shapes import Shape, sample

ASK, SAID = "<image>\nWhat is this?", "A cat."
QA = [{"from": "human", "value": ASK}, {"from": "gpt", "value": SAID}]
TALK = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]
TWO = [{"from": "human", "value": "<image>\n<image>\nWhich?"}, {"from": "gpt", "value": "One."}]
LLAVA = "LLaVA, `Finetune_Custom_Data.md`"
QWEN = "Qwen2.5-VL, `qwen-vl-finetune/README.md`"
INTERNVL = "InternVL, `chat_data_format`"
FACTORY = "LLaMA-Factory, `data/README.md`"
WEATHER = '{"name": "weather", "description": "Of a city"}'
UNKNOWN = (
    "key '{key}' is neither used nor known metadata; name it in data.metadata_keys if training "
    "may leave it aside"
)


def unknown(key: str) -> str:
    """Why a record with a key that nothing reads is refused."""
    return UNKNOWN.format(key=key)


def _llava(name: str, documented: str, file: str, record: dict[str, Any], *read: Any) -> Shape:
    return Shape(name, documented, file, [record], "llava", read)


SHAPES = (
    _llava(
        "LLaVA, custom data",
        LLAVA,
        "a.json",
        {"id": "997b", "image": "part-00000/997b.jpg", "conversations": QA},
        sample("997b", (ASK, SAID), ("part-00000/997b.jpg",)),
    ),
    _llava(
        "LLaVA, pre-training captions",
        "LLaVA-Pretrain's data set card",
        "a.json",
        {
            "id": "004539375",
            "image": "00453/004539375.jpg",
            "conversations": [
                {"from": "human", "value": "Render a summary of the photo.\n<image>"},
                {"from": "gpt", "value": "a table"},
            ],
        },
        sample(
            "004539375",
            ("Render a summary of the photo.\n<image>", "a table"),
            ("00453/004539375.jpg",),
        ),
    ),
    _llava(
        "LLaVA, text only, with `model`",
        "LLaVA-v1.5-mix665k's data set card",
        "a.json",
        {"id": "wg", "model": "", "conversations": TALK},
        sample("wg", ("Hello", "Hi!")),
    ),
    _llava(
        "LLaVA without `id`, one object a line",
        LLAVA,
        "a.jsonl",
        {"image": "1.jpg", "conversations": QA},
        sample("a.jsonl:1", (ASK, SAID), ("1.jpg",)),
    ),
    _llava(
        "LLaVA with a system turn",
        "LLaVA, `llava/train/train.py`",
        "a.jsonl",
        {"id": 3, "conversations": [{"from": "system", "value": "Be short."}, *TALK]},
        sample("3", ("Hello", "Hi!"), system="Be short."),
    ),
    _llava(
        "LLaVA whose `image` is empty",
        "LLaVA-NeXT's mixtures",
        "a.jsonl",
        {"id": "t", "image": "", "conversations": TALK},
        sample("t", ("Hello", "Hi!")),
    ),
    _llava(
        "LLaVA that begins with a greeting",
        "LLaVA, `llava/conversation.py`",
        "a.jsonl",
        {"id": "g", "conversations": [{"from": "gpt", "value": "Welcome"}, *TALK]},
        sample("g", ("Hello", "Hi!"), ignored=("a first turn from gpt",)),
    ),
    _llava(
        "LLaVA-NeXT-Interleave, M4-Instruct",
        "M4-Instruct-Data's data set card",
        "a.json",
        {
            "sample_id": "nlvr2_1",
            "image": ["a/0.png", "a/1.png"],
            "conversations": TWO,
            "choice_list": None,
            "metadata": {"dataset": "nlvr2"},
        },
        sample(
            "a.json[0]",
            (TWO[0]["value"], "One."),
            ("a/0.png", "a/1.png"),
            ignored=("sample_id", "metadata"),
        ),
    ),
    _llava(
        "ShareGPT4V",
        "ShareGPT4V, `Data.md`",
        "a.json",
        {"id": "000000000009", "image": "coco/train2017/000000000009.jpg", "conversations": QA},
        sample("000000000009", (ASK, SAID), ("coco/train2017/000000000009.jpg",)),
    ),
    _llava(
        "Qwen2.5-VL fine-tuning, one image",
        QWEN,
        "a.json",
        {"image": "images/001.jpg", "conversations": QA},
        sample("a.json[0]", (ASK, SAID), ("images/001.jpg",)),
    ),
    _llava(
        "Qwen2.5-VL fine-tuning, several images",
        QWEN,
        "a.json",
        {"images": ["cats/001.jpg", "cats/002.jpg"], "conversations": TWO},
        sample("a.json[0]", (TWO[0]["value"], "One."), ("cats/001.jpg", "cats/002.jpg")),
    ),
    Shape(
        "Qwen2.5-VL fine-tuning, video",
        QWEN,
        "a.json",
        [{"video": "videos/005.mp4", "conversations": TALK}],
        refused="key 'video' holds a video, which is not read yet; only text and images are",
    ),
    Shape(
        "Qwen-VL, images named in the text",
        "Qwen-VL, `README.md`",
        "a.json",
        [
            {
                "id": "identity_0",
                "conversations": [
                    {"from": "user", "value": "Picture 1: <img>assets/demo.jpeg</img>\nWhat?"},
                    {"from": "assistant", "value": SAID},
                ],
            }
        ],
        refused=(
            "a text names an image as Qwen-VL does, '<img>assets/demo.jpeg</img>'; give the path "
            "in 'image' and put <image> into the text"
        ),
    ),
    _llava(
        "Qwen-VL, text only, user and assistant",
        "Qwen-VL, `README.md`",
        "a.json",
        {
            "id": "identity_1",
            "conversations": [
                {"from": "user", "value": "Hello"},
                {"from": "assistant", "value": "Hi!"},
            ],
        },
        sample("identity_1", ("Hello", "Hi!")),
    ),
    _llava(
        "InternVL, one image",
        INTERNVL,
        "a.jsonl",
        {"id": 0, "image": "p/i.jpg", "width": 111, "height": 222, "conversations": QA},
        sample("0", (ASK, SAID), ("p/i.jpg",), ignored=("width", "height")),
    ),
    _llava(
        "InternVL, several images",
        INTERNVL,
        "a.jsonl",
        {
            "id": 1,
            "image": ["p/1.jpg", "p/2.jpg"],
            "width_list": [1, 3],
            "height_list": [2, 4],
            "conversations": TWO,
        },
        sample(
            "1",
            (TWO[0]["value"], "One."),
            ("p/1.jpg", "p/2.jpg"),
            ignored=("width_list", "height_list"),
        ),
    ),
    Shape(
        "InternVL, video",
        INTERNVL,
        "a.jsonl",
        [{"id": 2, "video": "p/v.mp4", "conversations": TALK}],
        refused="key 'video' holds a video, which is not read yet; only text and images are",
    ),
    _llava(
        "An answer without loss, a sample's weight",
        "this project",
        "a.jsonl",
        {
            "id": "w",
            "weight": 0.5,
            "conversations": [TALK[0], {**TALK[1], "loss": False}, *TALK],
        },
        sample("w", ("Hello", "Hi!", "Hello", "Hi!"), learned=(False, True), weight=0.5),
    ),
    Shape(
        "LLaMA-Factory, ShareGPT with tools",
        FACTORY,
        "a.json",
        [
            {
                "conversations": [
                    {"from": "human", "value": "Weather in Rome?"},
                    {
                        "from": "function_call",
                        "value": '{"name": "weather", "arguments": {"city": "Rome"}}',
                    },
                    {"from": "observation", "value": '{"sky": "blue"}'},
                    {"from": "gpt", "value": "Fine."},
                ],
                "system": "Help.",
                "tools": f"[{WEATHER}]",
            }
        ],
        "sharegpt",
        (
            sample(
                "a.json[0]",
                ("Weather in Rome?", "", "", "Fine."),
                system="Help.",
                tool_use=ToolUse(
                    tools=(WEATHER,),
                    calls=(('{"name": "weather", "arguments": {"city": "Rome"}}',), ()),
                    responses=((), ('{"sky": "blue"}',)),
                ),
            ),
        ),
    ),
    _llava(
        "LLaMA-Factory, ShareGPT with images",
        FACTORY,
        "a.json",
        {"conversations": QA, "images": ["mllm_demo_data/1.jpg"]},
        sample("a.json[0]", (ASK, SAID), ("mllm_demo_data/1.jpg",)),
    ),
    Shape(
        "LLaMA-Factory, preferences",
        FACTORY,
        "a.json",
        [
            {
                "conversations": TALK,
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            }
        ],
        refused=unknown("chosen"),
    ),
    _llava(
        "ShareGPT, text",
        "ShareGPT_Vicuna_unfiltered's data set card",
        "a.json",
        {"id": "QWJhYvA_0", "conversations": TALK},
        sample("QWJhYvA_0", ("Hello", "Hi!")),
    ),
    _llava(
        "Records compressed with gzip",
        LLAVA,
        "a.jsonl.gz",
        {"image": "1.jpg", "conversations": QA},
        sample("a.jsonl:1", (ASK, SAID), ("1.jpg",)),
    ),
    _llava(
        "Records compressed with zstd",
        LLAVA,
        "a.json.zst",
        {"image": "1.jpg", "conversations": QA},
        sample("a.json[0]", (ASK, SAID), ("1.jpg",)),
    ),
    Shape(
        "A file of several forms",
        "two files joined",
        "a.jsonl",
        [
            {"conversations": TALK},
            {"messages": [{"role": "user", "content": "Hello"}]},
        ],
        refused=(
            "data.sources[0].annotations: '{path}' line 1 (index 0) is a record of llava and "
            "'{path}' line 2 (index 1) one of messages; make a source of each form"
        ),
    ),
)
