"""Shapes of data sets with forms of their own, of shards and of tables."""

from __future__ import annotations

import json

from dattn_mcore.config.schema import MappingConfig
from dattn_mcore.data.sources.record import Inside
from tests.unit.data.shapes import Shape, png, sample
from tests.unit.data.shapes_llava import ASK, LLAVA, QA, SAID, TALK, TWO

PAIR = {"user": "What?", "assistant": "A cat.", "source": "aokvqa"}
OBELICS = "OBELICS's data set card"
PIXMO = "the data set cards of PixMo"
ENERGON = "Megatron-Energon, `data_prep`"
ONEVISION = "LLaVA-OneVision-1.5, conversion to WebDataset"
NO_FORM = (
    "data.sources[0].annotations: '{{path}}' line 1 (index 0) has the keys {keys}, which is no "
    "form that is known; set format: or mapping: of the source in data.sources (docs/data.md)"
)
VQA = {"000.jpg": png(), "000.context.txt": b"What?"}


def _url(field: str, url: str) -> str:
    return (
        f"{field} is the URL '{url}'; nothing is downloaded in training: download the images and "
        "give their paths"
    )


SHAPES = (
    Shape(
        "LLaVA-OneVision, parquet",
        "LLaVA-OneVision-Data's data set card",
        "a.parquet",
        [
            {
                "id": "x1",
                "image": {"bytes": png(), "path": "x1.png"},
                "conversations": QA,
                "data_source": "aokvqa",
            }
        ],
        "llava",
        (sample("x1", (ASK, SAID), (Inside("x1.png", 0),), ignored=("data_source",)),),
    ),
    Shape(
        "Conversations as JSON text, parquet",
        "many data sets of the Hub",
        "a.parquet",
        [{"conversations": json.dumps(QA), "image": "p/1.jpg"}],
        "llava",
        (sample("a-0", (ASK, SAID), ("p/1.jpg",)),),
    ),
    Shape(
        "The Cauldron, parquet",
        "the_cauldron's data set card",
        "a.parquet",
        [{"images": [{"bytes": png(), "path": None}], "texts": [PAIR, PAIR]}],
        "cauldron",
        (
            sample(
                "a-0",
                ("<image>What?", "A cat.", "What?", "A cat."),
                (Inside("row 0 image 0", 0),),
                ignored=("texts[].source",),
            ),
        ),
    ),
    Shape(
        "FineVision, parquet",
        "FineVision's data set card",
        "a.parquet",
        [
            {
                "images": [{"bytes": png(), "path": None}],
                "texts": [{"user": "What?", "assistant": "A cat."}],
                "source": "x",
                "relevance_ratings": [5],
                "relevance_min": 5,
            }
        ],
        "cauldron",
        (
            sample(
                "a-0",
                ("<image>What?", "A cat."),
                (Inside("row 0 image 0", 0),),
                ignored=("source", "relevance_ratings", "relevance_min"),
            ),
        ),
    ),
    Shape(
        "OBELICS, images downloaded",
        OBELICS,
        "a.jsonl",
        [
            {
                "images": ["1.jpg", None, "2.jpg"],
                "texts": [None, "A cat.", None],
                "metadata": "[]",
                "general_metadata": '{"url": "u"}',
            }
        ],
        "interleaved",
        (
            sample(
                "a.jsonl:1",
                ("<image>\n\nA cat.\n\n<image>",),
                ("1.jpg", "2.jpg"),
                ignored=("metadata", "general_metadata"),
                document=True,
            ),
        ),
    ),
    Shape(
        "OBELICS, as published",
        OBELICS,
        "a.jsonl",
        [{"images": ["https://a.b/1.jpg", None], "texts": [None, "A cat."]}],
        refused=_url("'images'[0]", "https://a.b/1.jpg"),
    ),
    Shape(
        "Interleaved with bytes, parquet",
        OBELICS,
        "a.parquet",
        [{"images": [None, {"bytes": png(), "path": None}], "texts": ["A cat.", None]}],
        "interleaved",
        (
            sample(
                "a-0",
                ("A cat.\n\n<image>",),
                (Inside("row 0 image 1", 1),),
                document=True,
            ),
        ),
    ),
    Shape(
        "MMC4, images downloaded",
        "MMC4, `README.md`",
        "a.jsonl",
        [
            {
                "url": "u",
                "text_list": ["One.", "Two."],
                "image_info": [
                    {
                        "image_name": "b.jpg",
                        "raw_url": "https://a.b/b.jpg",
                        "matched_text_index": 1,
                        "matched_sim": 0.3,
                    },
                    {"image_name": "a.jpg", "matched_text_index": 0},
                ],
                "similarity_matrix": [[0.1, 0.3]],
                "could_have_url_duplicate": 0,
            }
        ],
        "interleaved",
        (
            sample(
                "a.jsonl:1",
                ("<image>One. <image>Two.",),
                ("a.jpg", "b.jpg"),
                ignored=(
                    "url",
                    "similarity_matrix",
                    "could_have_url_duplicate",
                    "image_info[].raw_url",
                    "image_info[].matched_sim",
                ),
                document=True,
            ),
        ),
    ),
    Shape(
        "PixMo-Cap, as published",
        PIXMO,
        "a.jsonl",
        [{"image_url": "https://a.b/1.jpg", "caption": "A cat.", "transcripts": ["a cat"]}],
        refused=_url("'image_url'", "https://a.b/1.jpg"),
    ),
    Shape(
        "PixMo-Cap, images downloaded",
        PIXMO,
        "a.jsonl",
        [{"image_url": "1.jpg", "caption": "A cat.", "transcripts": ["a cat"]}],
        "pixmo",
        (sample("a.jsonl:1", ("<image>", "A cat."), ("1.jpg",), ignored=("transcripts",)),),
    ),
    Shape(
        "PixMo-Ask-Model-Anything",
        PIXMO,
        "a.jsonl",
        [{"image": "1.jpg", "image_sha256": "00", "question": "What?", "answer": "A cat."}],
        "pixmo",
        (sample("a.jsonl:1", ("<image>What?", "A cat."), ("1.jpg",), ignored=("image_sha256",)),),
    ),
    Shape(
        "Image and caption, parquet",
        "image captioning data sets of the Hub",
        "a.parquet",
        [{"image": {"bytes": png(), "path": "1.png"}, "caption": "A cat."}],
        "pixmo",
        (sample("a-0", ("<image>", "A cat."), (Inside("1.png", 0),)),),
    ),
    Shape(
        "VQAv2, ten answers",
        "VQAv2's data set card",
        "a.jsonl",
        [{"image": "1.jpg", "question": "What?", "answers": [{"answer": "cat"}]}],
        refused=NO_FORM.format(keys="'image', 'question', 'answers'"),
    ),
    Shape(
        "COCO captions",
        "COCO, data format",
        "a.json",
        {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "A cat."}]},
        refused=(
            "'{path}' starts with a JSON object over several lines (keys 'images', "
            "'annotations'); it must be a list of samples, or one object per line"
        ),
    ),
    Shape(
        "WebDataset, captions",
        "WebDataset, `README.md`",
        "a.tar",
        {"000.jpg": png(), "000.txt": b"A cat."},
        "webdataset",
        (sample("000", ("<image>", "A cat."), ("000.jpg",)),),
    ),
    Shape(
        "img2dataset",
        "img2dataset, `README.md`",
        "a.tar",
        {"000.jpg": png(), "000.txt": b"A cat.", "000.json": b'{"url": "u", "width": 8}'},
        "webdataset",
        (sample("000", ("<image>", "A cat."), ("000.jpg",), ignored=(".json",)),),
    ),
    Shape(
        "WebDataset of LLaVA records, compressed",
        LLAVA,
        "a.tar.gz",
        {"000.jpg": png(), "000.json": json.dumps({"conversations": QA}).encode()},
        "llava",
        (sample("000", (ASK, SAID), ("000.jpg",)),),
    ),
    Shape(
        "WebDataset of messages",
        "WebDataset, `README.md`",
        "a.tar",
        {
            "000.0.jpg": png(0),
            "000.1.jpg": png(1),
            "000.json": json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": "Which?"},
                        {"role": "assistant", "content": "One."},
                    ]
                }
            ).encode(),
        },
        "messages",
        (sample("000", ("<image><image>Which?", "One."), ("000.0.jpg", "000.1.jpg")),),
    ),
    Shape(
        "WebDataset of records that name their images",
        "WebDataset, `README.md`",
        "a.tar",
        {
            "000.b.jpg": png(0),
            "000.a.jpg": png(1),
            "000.json": json.dumps({"images": ["a.jpg", "b.jpg"], "conversations": TWO}).encode(),
        },
        "llava",
        (sample("000", (TWO[0]["value"], "One."), ("a.jpg", "b.jpg")),),
    ),
    Shape(
        "Energon, VQA in parts",
        ENERGON,
        "a.tar",
        {**VQA, "000.answers.json": b'["A cat."]', "000.answer_weights.json": b"[1.0]"},
        "energon",
        (sample("000", ("<image>What?", "A cat."), ("000.jpg",), ignored=("answer_weights",)),),
    ),
    Shape(
        "Energon, VQA with different answers",
        ENERGON,
        "a.tar",
        {**VQA, "000.answers.json": b'["A cat.", "cat"]'},
        refused=(
            "'answers' holds 2 different answers; which one is learned must not depend on chance: "
            "keep one"
        ),
    ),
    Shape(
        "Energon, a list of turns",
        "Pai-Megatron-Patch, LLaVA-Pretrain to Energon",
        "a.tar",
        {"000.jpg": png(), "000.json": json.dumps(QA).encode()},
        "llava",
        (sample("000", (ASK, SAID), ("000.jpg",)),),
    ),
    Shape(
        "Energon, captions",
        ENERGON,
        "a.tar",
        {"s/000.jpg": png(), "s/000.txt": b"A cat.", "s/001.jpg": png(1), "s/001.txt": b"A dog."},
        "webdataset",
        (
            sample("s/000", ("<image>", "A cat."), ("s/000.jpg",)),
            sample("s/001", ("<image>", "A dog."), ("s/001.jpg",)),
        ),
    ),
    Shape(
        "Energon, interleaved",
        ENERGON,
        "a.tar",
        {
            "000.0.jpg": png(),
            "000.1.jpg": png(1),
            "000.json": json.dumps(
                {"images": ["0.jpg", None, "1.jpg"], "texts": [None, "A cat.", None]}
            ).encode(),
        },
        "interleaved",
        (sample("000", ("<image>\n\nA cat.\n\n<image>",), ("0.jpg", "1.jpg"), document=True),),
    ),
    Shape(
        "LLaVA-OneVision-1.5, tar",
        ONEVISION,
        "a.tar",
        {
            "image_0.0_image": png(),
            "image_0.json": json.dumps(
                {
                    "texts": [
                        {"role": "user", "content": ASK},
                        {"role": "assistant", "content": SAID},
                    ],
                    "media": "image",
                    "name": ["0_image"],
                }
            ).encode(),
        },
        "energon",
        (sample("image_0", (ASK, SAID), ("0_image",)),),
    ),
    Shape(
        "LLaVA-OneVision-1.5, video",
        ONEVISION,
        "a.jsonl",
        [{"texts": [{"role": "user", "content": "What?"}], "media": "video", "name": ["v"]}],
        refused="'media' is 'video'; only text and images are read",
    ),
    Shape(
        "`datasets`, a folder of save_to_disk",
        "datasets, `save_to_disk`",
        "saved",
        [
            {
                "messages": [
                    {"role": "user", "content": "What?"},
                    {"role": "assistant", "content": "A cat."},
                ],
                "images": [{"bytes": png(), "path": "1.png"}],
            }
        ],
        "messages",
        (sample("data-00000-of-00001-0", ("<image>What?", "A cat."), (Inside("1.png", 0),)),),
    ),
    Shape(
        "Any other keys, with `mapping:`",
        "this project",
        "a.jsonl",
        [{"media": {"files": [{"path": "1.jpg"}]}, "qa": {"q": "What?", "a": "A cat."}}],
        "mapping",
        (sample("a.jsonl:1", ("<image>What?", "A cat."), ("1.jpg",)),),
        mapping=MappingConfig(images="media.files[].path", question="qa.q", answer="qa.a"),
    ),
    Shape(
        "LLaVA-Interleave's text records",
        "LLaVA-NeXT's mixtures",
        "a.json",
        [{"id": "t1", "image": [], "conversations": TALK}],
        "llava",
        (sample("t1", ("Hello", "Hi!")),),
    ),
)
