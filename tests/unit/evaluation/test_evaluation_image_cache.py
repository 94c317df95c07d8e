"""The evaluation with images' keys and values kept: the same answers, each image computed once."""

import json
import logging
import shutil

import pytest
import torch
from PIL import Image

from dattn_mcore.evaluation.__main__ import main
from dattn_mcore.evaluation.batch_inputs import repeated
from dattn_mcore.evaluation.benchmarks.gqa import Gqa
from dattn_mcore.evaluation.benchmarks.pope import Pope
from dattn_mcore.evaluation.generation import Generator, Request
from dattn_mcore.evaluation.images import Picture
from dattn_mcore.hf import image_cache_dattn
from dattn_mcore.hf.image_cache_dattn import compute_image
from tests.unit.evaluation import trees
from tests.unit.evaluation.tiny_runs import answers, run, scores

IMAGES = 3
WORDS = ("cat", "red ball", "tall tree", "x", "very small thing on the left side", "dog")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """POPE and GQA as they are: many questions about few images, those of one far apart."""
    root = tmp_path_factory.mktemp("by_image")
    asked = []
    for split in ("random", "popular", "adversarial"):
        labels = []
        for number, word in enumerate(WORDS):
            image = f"COCO_val2014_{number % IMAGES}.jpg"
            text = f"Is there a {split} {word} in the image?"
            label = ("yes", "no")[number % 2]
            labels.append({"question_id": number + 1, "image": image, "text": text, "label": label})
            text += trees.SHORT_ANSWER
            asked.append(
                {"question_id": len(asked), "image": image, "text": text, "category": split}
            )
        trees.lines(root / f"pope/coco/coco_pope_{split}.json", labels)
    trees.lines(root / "pope/llava_pope_test.jsonl", asked)
    asked, official = [], {}
    for number, word in enumerate((WORDS * 2)[:9]):  # of ten, one must be right
        question = f"Where is the {word}, {number}?"
        name, image = f"20{number}", f"n{number % 2}.jpg"
        text = question + trees.SHORT_ANSWER
        asked.append({"question_id": name, "image": image, "text": text})
        official[name] = {"question": question, "answer": "left", "types": {"structural": "query"}}
    trees.lines(root / "gqa/llava_gqa_testdev_balanced.jsonl", asked)
    trees.put(root / "gqa/data/testdev_balanced_questions.json", json.dumps(official))
    for number in range(IMAGES):
        picture = trees.picture(30 + number, "JPEG")
        trees.put(root / f"pope/val2014/COCO_val2014_{number}.jpg", picture)
        trees.put(root / f"gqa/data/images/n{number}.jpg", trees.picture(60 + number, "JPEG"))
    return root


@pytest.fixture
def computed(monkeypatch):
    """One entry for each image that is carried through the model for the cache."""
    calls = []

    def counted(*args):
        calls.append(1)
        return compute_image(*args)

    monkeypatch.setattr(image_cache_dattn, "compute_image", counted)
    return calls


def test_answers_do_not_change(tiny_model, data, tmp_path, computed, capsys):
    """With room for all images, for one, and without the cache: the same files, byte by byte."""
    names = "--benchmarks=pope,gqa"
    found = {}
    for gib in ("0", "4", "0.00006"):  # the last holds one image of this model, not two
        out = tmp_path / gib
        size = f"--image-cache-gib={gib}"
        computed.clear()
        assert run(tiny_model, out, names, size, "--batch-size=4", data=data) == 0
        found[gib] = answers(out)
        # One for the self-check; a benchmark's images, each once as its questions stand together.
        assert len(computed) == (0 if gib == "0" else 1 + IMAGES + 2)
        assert scores(out)["run"]["decoding"]["image_cache_gib"] == float(gib)
        log = capsys.readouterr().err
        assert ("of images cached" in log) == (gib != "0")
    assert found["4"] == found["0.00006"] == found["0"]
    texts = {json.loads(line)["text"] for file in found["0"].values() for line in file.splitlines()}
    assert len(texts) > 5  # the model answers differently to different rows
    pope = [json.loads(line) for line in found["4"]["pope"].splitlines()]
    assert [r["question_id"] for r in pope] == [r.question_id for r in Pope(data).rows]


def test_a_run_that_was_ended_goes_on_with_the_cache(tiny_model, data, tmp_path):
    """What was answered without it stays, and the rest is as without it."""
    names = "--benchmarks=pope"
    assert run(tiny_model, tmp_path / "a", names, "--image-cache-gib=0", data=data) == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    whole = tmp_path / "b/answers/pope.jsonl"
    kept = [json.loads(line) for line in whole.read_text().splitlines()][1::3]
    for record in kept:
        record["text"] = "KEPT"
    trees.lines(tmp_path / "b/answers/parts/pope/0.jsonl", kept)
    whole.unlink()
    assert run(tiny_model, tmp_path / "b", names, "--batch-size=5", data=data) == 0
    pairs = zip(
        answers(tmp_path / "a")["pope"].splitlines(),
        answers(tmp_path / "b")["pope"].splitlines(),
        strict=True,
    )
    for number, (before, now) in enumerate(pairs):
        assert ('"KEPT"' in now) == (number % 3 == 1)
        assert now == before or '"KEPT"' in now


def generator(tiny_model, gib=4.0):
    return Generator(tiny_model / "tiny", torch.device("cpu"), image_cache_gib=gib)


def requests(data):
    """Of GQA, one with two images, and one with none."""
    rows = Gqa(data).rows
    one, two = rows[0].pictures[0], rows[1].pictures[0]
    asked = [Request(str(row.question_id), row.text, row.pictures) for row in rows[:5]]
    asked.append(Request("both", "<image><image>\nWhich?", (two, one)))
    return [*asked, Request("none", "What is red?", ())]


def test_a_batch_is_what_the_processor_gives(tiny_model, data):
    """Though each image is prepared once, however often it is shown."""
    model, asked = generator(tiny_model), requests(data)
    prompts = [model.chat_prompt(request.text) for request in asked]
    order = [5, 0, 6, 3, 1]
    found = model._inputs(asked, prompts, order)
    images = [Image.open(p.source).convert("RGB") for n in order for p in asked[n].pictures]
    text = [prompts[n] for n in order]
    expected = model.processor(text=text, images=images, padding=True, return_tensors="pt")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_images_of_several_tiles_are_repeated_whole():
    tiles = torch.arange(5.0).view(5, 1, 1, 1)  # the first image has three tiles, the others one
    grids = torch.tensor([[2, 1], [0, 0], [0, 0]])
    found = repeated({"pixel_values": tiles, "image_grids": grids}, [1, 0, 1, 2])
    assert found["pixel_values"].flatten().tolist() == [3, 0, 1, 2, 3, 4]
    assert found["image_grids"].tolist() == [[0, 0], [2, 1], [0, 0], [0, 0]]


def test_memory_that_runs_out_costs_the_cache_only(tiny_model, data, monkeypatch, caplog):
    """The images that are kept make room for a batch, and no more are kept."""
    model, asked = generator(tiny_model), requests(data)
    expected: dict[int, str] = {}
    for batch in generator(tiny_model, 0.0).generate(asked, 2, 5):
        expected |= batch
    generate, calls = model.model.generate, []

    def short_of_memory(**inputs):
        calls.append(len(model.image_cache))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("as on a GPU")
        return generate(**inputs)

    monkeypatch.setattr(model.model, "generate", short_of_memory)
    found: dict[int, str] = {}
    with caplog.at_level(logging.WARNING):
        for batch in model.generate(asked, 2, 5):
            found |= batch
    assert found == expected
    assert calls[2] > 0 and calls[3:] == [0, 0]
    assert "none are kept from here on" in caplog.text


def test_a_model_whose_images_depend_on_their_place(tiny_model, data, tmp_path, caplog):
    """It is asked as before, and the log says why."""
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_model / "tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "t2v_position": "rope"}))
    with caplog.at_level(logging.INFO):
        model = Generator(folder, torch.device("cpu"), image_cache_gib=4.0)
    assert model.image_cache is None
    assert "computed anew for each question: t2v_position is 'rope'" in caplog.text
    assert len(list(model.generate(requests(data), 4, 3))) == 2


def test_a_picture_in_a_table_is_known_by_its_bytes():
    assert Picture("a", b"12").key == Picture("b", b"12").key != Picture("a", b"13").key


@pytest.mark.parametrize("size", ["-1", "nan", "much"])
def test_wrong_sizes_are_refused(size, capsys):
    with pytest.raises(SystemExit):
        main(["run", "--model=m", "--data=d", f"--image-cache-gib={size}"])
    assert f"'{size}' must be a number of GiB, 0 or more" in capsys.readouterr().err
