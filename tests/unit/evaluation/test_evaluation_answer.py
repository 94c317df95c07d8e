"""The answer runner: order, batching, and what it says about bad input."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dattn_mcore.errors import CheckpointError
from dattn_mcore.evaluation.__main__ import main
from dattn_mcore.evaluation.answer import Answerer, Settings
from dattn_mcore.evaluation.generation import Generator, resolve_device
from dattn_mcore.evaluation.questions import read_questions
from tests.unit.convert.convert_helpers import make_checkpoint, make_tokenizer, small_config
from tools.checkpoint_convert import mcore_to_hf


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An exported model, images, and a question file of every kind of question."""
    folder = tmp_path_factory.mktemp("world")
    make_checkpoint(folder / "a", small_config(make_tokenizer(folder)))
    mcore_to_hf.convert(folder / "a", folder / "model")
    (folder / "images/sub").mkdir(parents=True)
    for i in range(4):
        noise = torch.randint(0, 255, (20 + i, 30, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"images/sub/{i}.png")
    records = [
        {"question_id": "one", "image": "sub/0.png", "text": "Which digit?", "category": "cell"},
        {"question_id": 2, "image": ["sub/1.png", "sub/2.png"], "text": "Compare them."},
        {"question_id": "none", "text": "No image here."},
        {"question_id": "marked", "image": "sub/3.png", "text": "In <image>, where is the 5?"},
        {"question_id": "long", "image": "sub/3.png", "text": "Where is the 5? " * 6},
    ]
    write_lines(folder / "questions.jsonl", records)
    return folder


def write_lines(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def command(world, tmp_path, *more, **changes):
    values = {
        "model": world / "model",
        "questions": world / "questions.jsonl",
        "image-folder": world / "images",
        "answers": tmp_path / "answers.jsonl",
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }
    return main(["answer", *(f"--{n}={v}" for n, v in values.items()), *more])


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_in_the_order_of_questions(world, tmp_path, capsys):
    """LLaVA's fields, one answer a question, whatever the batch size."""
    assert command(world, tmp_path, "--batch-size=2", "--max-new-tokens=6") == 0
    answers = read_lines(tmp_path / "answers.jsonl")
    assert [a["question_id"] for a in answers] == ["one", 2, "none", "marked", "long"]
    fields = {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert all(set(answer) == fields for answer in answers)
    assert answers[0]["prompt"] == "Which digit?"
    assert answers[0]["model_id"] == "model"
    assert answers[1]["metadata"]["chat_prompt"].startswith("<s>[INST] <image>\n<image>\nCompare")
    assert answers[3]["metadata"]["chat_prompt"] == "<s>[INST] In <image>, where is the 5?[/INST]"
    assert len({a["answer_id"] for a in answers}) == 5
    assert "5 answers" in capsys.readouterr().out
    assert command(world, tmp_path, "--batch-size=5", "--max-new-tokens=6") == 0
    assert read_lines(tmp_path / "answers.jsonl") == answers


def test_answers_equal_plain_generation(world):
    """The text of an answer is what generate says, without special tokens."""
    answerer = Answerer(world / "model", Settings(max_new_tokens=5, device="cpu"))
    questions = read_questions(world / "questions.jsonl")
    answers = answerer.answer(questions, world / "images")
    inputs = answerer.processor(
        text="<s>[INST] <image>\nWhich digit?[/INST]",
        images=[Image.open(world / "images/sub/0.png")],
        return_tensors="pt",
    )
    out = answerer.generator.model.generate(**inputs, max_new_tokens=5)
    expected = answerer.processor.decode(
        out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert answers[0].text == expected.strip()


def fails(capsys) -> str:
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


BAD_LINES = [
    ('{"question_id": "a", "text": "x"', ":2: is not JSON"),
    ("[1]", ":2: must be a JSON object"),
    ('{"text": "x"}', ":2: question_id is None"),
    ('{"question_id": "one", "text": "x"}', ":2: question_id 'one' stands in line 1"),
    ('{"question_id": "a"}', ":2: text is None"),
    ('{"question_id": "a", "text": "x", "image": 3}', ":2: image is 3"),
    ('{"question_id": "a", "text": "<image> <image>", "image": "x.png"}', "2 <image>"),
    ('{"question_id": "a", "text": "<image>"}', "1 <image> but the question has 0 images"),
    ('{"question_id": "a", "text": "x", "image": "absent.png"}', "'absent.png' is not in"),
    ('{"question_id": "a", "text": "x", "image": "../a/dattn.json"}', "is outside"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_questions(world, tmp_path, capsys, line, message):
    """One line that names file and line, or question and image; no answer file."""
    path = tmp_path / "q.jsonl"
    path.write_text('{"question_id": "one", "text": "x"}\n' + line + "\n")
    assert command(world, tmp_path, questions=path) == 2
    assert message in fails(capsys)
    assert not (tmp_path / "answers.jsonl").exists()


def test_bad_images(world, tmp_path, capsys):
    """Not an image, and a truncated one."""
    (tmp_path / "text.png").write_text("hello")
    whole = (world / "images/sub/0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name in ("text.png", "cut.png"):
        path = write_lines(tmp_path / "q.jsonl", [{"question_id": "q", "text": "x", "image": name}])
        assert command(world, tmp_path, questions=path, image_folder=tmp_path) == 2
        error = fails(capsys)
        assert name in error and "'q'" in error and "cannot be decoded" in error


def test_bad_arguments(world, tmp_path, capsys):
    """Missing files and folders, and an unknown device."""
    assert command(world, tmp_path, questions=tmp_path / "none.jsonl") == 2
    assert "none.jsonl cannot be read" in fails(capsys)
    assert command(world, tmp_path, model=tmp_path) == 2
    assert "has no config.json" in fails(capsys)
    assert command(world, tmp_path, image_folder=tmp_path / "none") == 2
    assert "is no folder" in fails(capsys)
    assert command(world, tmp_path, device="tpu") == 2
    assert "auto, cpu or gpu" in fails(capsys)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text('{"model_type": "dattn"')
    assert command(world, tmp_path, model=tmp_path / "broken") == 2
    assert "cannot be loaded (config" in fails(capsys)
    (tmp_path / "broken/config.json").write_text('{"model_type": "dattn"}')
    assert command(world, tmp_path, model=tmp_path / "broken") == 2
    assert "cannot be loaded" in fails(capsys)
    (tmp_path / "broken/config.json").write_text('{"model_type": "llava"}')
    assert command(world, tmp_path, model=tmp_path / "broken") == 2
    assert "has model_type 'llava' in its config.json; it must be 'dattn'" in fails(capsys)
    dumb = shutil.copytree(world / "model", tmp_path / "dumb")
    (dumb / "chat_template.jinja").unlink()
    assert command(world, tmp_path, model=dumb) == 2
    assert "has no chat template" in fails(capsys)
    assert resolve_device("cpu") == torch.device("cpu")


def test_no_answers_from_random_weights(world, tmp_path, capsys):
    """A tensor that is missing, strange or of another shape; tied embeddings are none of these."""
    model = shutil.copytree(world / "model", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    norm = next(name for name in weights if name.endswith("layers.1.input_layernorm.weight"))
    head = weights.pop("lm_head.weight")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert command(world, tmp_path, model=model) == 2
    assert "config.json: 1 missing (lm_head.weight); copy or export" in fails(capsys)
    weights |= {"lm_head.weight": head, "odd": head.clone(), norm: weights[norm][:3].clone()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"1 unexpected .odd.; 1 mismatched .{norm}.;"):
        Generator(model, torch.device("cpu"))

    make_checkpoint(tmp_path / "g", small_config(make_tokenizer(tmp_path), family="gemma2"))
    mcore_to_hf.convert(tmp_path / "g", tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied/model.safetensors")
    Generator(tmp_path / "tied", torch.device("cpu"))
