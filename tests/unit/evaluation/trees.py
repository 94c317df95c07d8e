"""Small data trees in the original layout of all twelve benchmarks."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from dattn_mcore.evaluation.text import LETTER_ANSWER, SHORT_ANSWER

ENDING = " Please answer yes or no."
VIZWIZ = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def picture(seed: int, kind: str = "PNG") -> bytes:
    """A small image of noise, another for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (20 + seed % 5, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(path: Path, records: list[dict]) -> Path:
    return put(path, "".join(json.dumps(record) + "\n" for record in records))


def scienceqa(root: Path) -> None:
    questions, problems = [], {}
    for number, choices in enumerate((["left", "right"], ["one", "two", "three"], ["up", "down"])):
        text = f"Context: N/A\nWhich is it, number {number}?" + "".join(
            f"\n{letter}. {choice}" for letter, choice in zip("ABC", choices, strict=False)
        )
        entry = {"id": str(number), "conversations": [{"from": "human", "value": text}]}
        if number != 1:  # one row without an image
            entry["image"] = f"{number}/image.png"
            entry["conversations"][0]["value"] = "<image>\n" + text
            put(root / f"images/test/{number}/image.png", picture(number))
        questions.append(entry)
        problems[str(number)] = {"choices": choices, "answer": number % 2, "split": "test"}
    put(root / "llava_test_CQM-A.json", json.dumps(questions))
    put(root / "problems.json", json.dumps(problems))
    put(root / "pid_splits.json", json.dumps({"test": list(problems), "train": []}))


def mme(root: Path) -> None:
    images = root / "MME_Benchmark_release_version"
    records = []
    for task, folder in (("existence", ""), ("artwork", "images/")):
        for number in range(2):
            name = f"{task}/{folder}{number}.png"
            put(images / name, picture(10 + number))
            asked = [f"Is there thing {number} in it?", f"Is there thing {number} not in it?"]
            # The original separates the ending by one space or by two.
            truth = f"{asked[0]}{ENDING}\tYes\n{asked[1]} {ENDING}\tNo\n"
            truths = images / task / ("questions_answers_YN" if folder else "")
            put(truths / f"{number}.txt", truth)
            records += [
                {"question_id": name, "image": name, "text": text + SHORT_ANSWER, "category": task}
                for text in asked
            ]
    lines(root / "llava_mme.jsonl", records)


def gqa(root: Path) -> None:
    records, official = [], {}
    for number, (question, answer, kind) in enumerate(
        (("What is red?", "ball", "query"), ("Is it red?", "yes", "verify"))
    ):
        put(root / f"data/images/n{number}.jpg", picture(20 + number, "JPEG"))
        name = f"20{number}"
        text = question + SHORT_ANSWER
        records.append({"question_id": name, "image": f"n{number}.jpg", "text": text})
        official[name] = {"question": question, "answer": answer, "types": {"structural": kind}}
    lines(root / "llava_gqa_testdev_balanced.jsonl", records)
    put(root / "data/testdev_balanced_questions.json", json.dumps(official))


def pope(root: Path) -> None:
    questions = []
    for split in ("random", "popular", "adversarial"):
        labels = []
        for number, label in enumerate(("yes", "no")):
            image = f"COCO_val2014_{number}.jpg"
            put(root / "val2014" / image, picture(30 + number, "JPEG"))
            text = f"Is there a {split} thing {number} in the image?"
            labels.append({"question_id": number + 1, "image": image, "text": text, "label": label})
            questions.append(
                {
                    "question_id": len(questions),
                    "image": image,
                    "text": text + SHORT_ANSWER,
                    "category": split,
                }
            )
        lines(root / f"coco/coco_pope_{split}.json", labels)
    lines(root / "llava_pope_test.jsonl", questions)


def textvqa(root: Path) -> None:
    records, data = [], []
    put(root / "train_images/abc.jpg", picture(40, "JPEG"))
    for question, answer in (("What does it say?", "stop"), ("What color is it?", "red")):
        text = f"{question}\nReference OCR token: STOP, all{SHORT_ANSWER}"
        records.append({"question_id": "abc", "image": "abc.jpg", "text": text})
        answers = [answer] * 4 + ["other"] * 2 + ["none"] * 4
        data.append({"image_id": "abc", "question": question, "answers": answers})
    lines(root / "llava_textvqa_val_v051_ocr.jsonl", records)
    put(root / "TextVQA_0.5.1_val.json", json.dumps({"data": data}))


def seed_bench(root: Path) -> None:
    records, questions = [], []
    kinds = {"Scene Understanding": 1, "Action Recognition": 10}
    for number, (folder, data_type, kind) in enumerate(
        (("SEED-Bench-image", "image", 1), ("SEED-Bench-video-image", "video", 10))
    ):
        image = f"{folder}/frame_{number}.png"
        put(root / image, picture(50 + number))
        text = "What is it?\nA. a\nB. b\nC. c\nD. d" + LETTER_ANSWER
        records.append({"question_id": number, "image": image, "text": text})
        questions.append(
            {
                "question_id": str(number),
                "answer": "AB"[number],
                "data_type": data_type,
                "question_type_id": kind,
            }
        )
    lines(root / "llava-seed-bench.jsonl", records)
    put(root / "SEED-Bench.json", json.dumps({"questions": questions, "question_type": kinds}))


def llava_bench(root: Path) -> None:
    questions, contexts, references = [], [], []
    for number, category in enumerate(("conv", "detail", "complex")):
        image = f"00{number}.jpg"
        put(root / "images" / image, picture(60 + number, "JPEG"))
        questions.append(
            {
                "question_id": number,
                "image": image,
                "text": f"What is {number}?",
                "category": category,
            }
        )
        contexts.append({"image": image, "caption": [f"A photo of {number}."]})
        references.append({"question_id": number, "text": f"It is {number}."})
    lines(root / "questions.jsonl", questions)
    lines(root / "context.jsonl", contexts)
    lines(root / "answers_gpt4.jsonl", references[::-1])  # joined by id, not by position


def mm_vet(root: Path) -> None:
    questions, truth = [], {}
    for number in range(2):
        image = f"v1_{number}.png"
        put(root / "images" / image, picture(70 + number))
        questions.append(
            {
                "question_id": number,
                "image": image,
                "text": f"What is x in {number}?",
                "category": "conv",
            }
        )
        truth[f"v1_{number}"] = {
            "imagename": image,
            "answer": f"{number}<OR>zero",
            "capability": ["ocr", "math"][: number + 1],
        }
    lines(root / "llava-mm-vet.jsonl", questions)
    put(root / "mm-vet.json", json.dumps(truth))


def vqav2(root: Path, count: int = 9) -> None:
    """More rows than a batch of 8, of different lengths: a batch of it is full, and padded."""
    records = []
    for number in range(count):
        image = f"COCO_test2015_{number}.jpg"
        put(root / "test2015" / image, picture(80 + number, "JPEG"))
        text = f"What is {number}{' and more' * (number % 4)}?" + SHORT_ANSWER
        records.append({"question_id": 262144000 + number, "image": image, "text": text})
    lines(root / "llava_vqav2_mscoco_test-dev2015.jsonl", records)
    more = {"question_id": 7, "image": "other.jpg", "text": "Not asked?"}
    lines(root / "llava_vqav2_mscoco_test2015.jsonl", [more, *records])


MMBENCH_COLUMNS = [
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "source",
    "l2-category",
    "comment",
    "split",
]


def mmbench_rows(rotations: tuple[int, ...] = (0, 1)) -> list[dict]:
    """Two questions of two options, each rotation in a row of its own."""
    rows = []
    for rotation in rotations:
        for number in range(2):
            options = ["cat", "dog"][rotation:] + ["cat", "dog"][:rotation]
            rows.append(
                {
                    "index": number + rotation * 1_000_000,
                    "question": f"Which is {number}?",
                    "hint": "Look closely." if number else "nan",
                    **dict(zip("AB", options, strict=True)),
                    "answer": "AB"[options.index("cat")],
                    "category": "identity",
                    "image": base64.b64encode(picture(90 + number)).decode(),
                    "source": "made",
                    "l2-category": "finegrained",
                    "split": "dev",
                }
            )
    return rows


def write_tsv(path: Path, rows: list[dict], columns: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def mmbench(root: Path) -> None:
    write_tsv(root / "mmbench_dev_20230712.tsv", mmbench_rows(), MMBENCH_COLUMNS)


def vizwiz(root: Path) -> None:
    records = []
    for number in range(2):
        image = f"VizWiz_test_{number}.jpg"
        put(root / "test" / image, picture(100 + number, "JPEG"))
        text = f"What is this thing, {number}?" + VIZWIZ + SHORT_ANSWER
        records.append({"question_id": number, "image": image, "text": text})
    lines(root / "llava_test.jsonl", records)


def mmstar_rows() -> list[dict]:
    return [
        {
            "index": number,
            "question": f"Where is {number}?\nOptions: A: x, B: y",
            "image": picture(110 + number, "JPEG"),
            "answer": "AB"[number],
            "category": ("math", "coarse perception")[number],
            "l2_category": "geometry",
        }
        for number in range(2)
    ]


def mmstar(root: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    root.mkdir(parents=True)
    write_table(pyarrow.Table.from_pylist(mmstar_rows()), root / "mmstar.parquet")


def mmstar_tsv(root: Path) -> None:
    """VLMEvalKit's form: images in base64, options in columns of their own."""
    rows = [
        {**row, "image": base64.b64encode(row["image"]).decode(), "A": "x", "B": "y"}
        for row in mmstar_rows()
    ]
    write_tsv(root / "MMStar.tsv", rows, list(rows[0]))


MAKERS = {
    "scienceqa": scienceqa,
    "MME": mme,
    "gqa": gqa,
    "pope": pope,
    "textvqa": textvqa,
    "seed_bench": seed_bench,
    "llava-bench-in-the-wild": llava_bench,
    "mm-vet": mm_vet,
    "vqav2": vqav2,
    "mmbench": mmbench,
    "vizwiz": vizwiz,
    "mmstar": mmstar,
}


def make_tree(data: Path) -> Path:
    """All twelve folders."""
    for folder, make in MAKERS.items():
        make(data / folder)
    return data
