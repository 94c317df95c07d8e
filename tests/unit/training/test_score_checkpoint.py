"""What scores a checkpoint: as the evaluation by hand, and nothing of a bad one."""

import json
import shutil
from dataclasses import replace

import pytest

from dattn_mcore.config.schema import ScoresConfig
from dattn_mcore.errors import DattnError
from dattn_mcore.evaluation.__main__ import main
from dattn_mcore.training import score_checkpoint
from dattn_mcore.training.score_checkpoint import read_scores, score, write_request


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint, small benchmarks, and questions."""
    from tests.unit.convert.convert_helpers import make_checkpoint, make_tokenizer, small_config
    from tests.unit.evaluation.trees import lines, make_tree, picture, put

    folder = tmp_path_factory.mktemp("scored")
    make_checkpoint(folder / "mcore", small_config(make_tokenizer(folder)))
    make_tree(folder / "val")
    records = []
    for number in range(7):
        put(folder / f"images/{number}.png", picture(number))
        record = {"question_id": number, "image": f"{number}.png", "text": f"What is {number}?"}
        records.append({**record, "answer": "7", "category": "ab"[number % 2]})
    lines(folder / "own.jsonl", records)
    return folder


def settings(world, **changes):
    return ScoresConfig(
        benchmarks=("mme", "mmbench"),
        data=str(world / "val"),
        questions=str(world / "own.jsonl"),
        image_folder=str(world / "images"),
        samples=5,
        max_new_tokens=4,
        device="cpu",
        examples=5,
        **changes,
    )


def request(tmp_path, world, **changes):
    folder = tmp_path / "scores/step_00000012"
    folder.mkdir(parents=True)
    write_request(folder, 12, world / "mcore", settings(world, **changes))
    return folder


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_the_scores_are_those_of_the_evaluation_by_hand(tmp_path, world):
    folder = request(tmp_path, world, keep_export=True)
    assert read_scores(folder) is None
    score(folder)
    found = read_scores(folder)
    assert found.step == 12 and list(found.values) == ["mme", "mmbench", "questions"]
    assert not found.problems
    assert found.notes["mmbench"].startswith("all 4 answers are the same")
    assert "no answer is right" in found.notes["questions"]
    model, out = f"--model={folder / 'hf'}", tmp_path / "by_hand"
    common = [model, "--max-new-tokens=4", "--device=cpu", "--limit=5"]
    asked = [f"--data={world / 'val'}", "--benchmarks=mme,mmbench", f"--out={out}"]
    assert main(["run", *asked, *common]) == 0
    own = f"--questions={world / 'own.jsonl'}"
    answers = f"--answers={out / 'own_answers.jsonl'}"
    images = f"--image-folder={world / 'images'}"
    assert main(["answer", own, images, answers, *common]) == 0
    assert main(["score-questions", own, answers, "--limit=5", f"--json={out / 'own'}"]) == 0
    by_hand = json.loads((out / "scores.json").read_text())["benchmarks"]
    for name in ("mme", "mmbench"):
        assert found.values[name] == by_hand[name]["value"]
        assert by_hand[name]["rows"] == 4  # two pairs; one question in its four rotations
        ours = texts(folder / f"benchmarks/answers/{name}.jsonl")
        assert ours == texts(out / f"answers/{name}.jsonl")
    beside = json.loads((folder / "benchmarks/scores.json").read_text())["run"]["decoding"]
    assert beside["image_cache_gib"] == 1.0  # the memory is the run's
    exact = json.loads((out / "own").read_text())["overall"]
    assert exact["total"] == 5
    assert found.values["questions"] == 100 * exact["accuracy"]
    assert texts(folder / "answers.jsonl") == texts(out / "own_answers.jsonl")
    # Two of each benchmark, one of the own: of MMBench from the table, all as files.
    assert [example.image.is_file() for example in found.examples] == [True] * 5
    assert found.examples[0].question.startswith("Is there thing")


def test_a_checkpoint_that_is_damaged_has_no_scores(tmp_path, world, capfd):
    folder = request(tmp_path, world)
    damaged = shutil.copytree(world / "mcore", tmp_path / "damaged")
    shard = max(damaged.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    write_request(folder, 12, damaged, settings(world))
    with pytest.raises(DattnError, match="damaged was not exported: .*damaged"):
        score(folder)
    assert not (folder / "hf").exists() and read_scores(folder) is None


def test_the_weights_go_afterwards_and_a_benchmark_may_fail_alone(tmp_path, world, monkeypatch):
    data = shutil.copytree(world / "val", tmp_path / "val")
    shutil.rmtree(data / "MME/MME_Benchmark_release_version")
    folder = tmp_path / "scores/step_00000012"
    folder.mkdir(parents=True)
    asked = replace(settings(world), data=str(data), questions=None, image_folder=None)
    write_request(folder, 12, world / "mcore", asked)

    def as_if_exported(checkpoint, export):
        from tools.checkpoint_convert import mcore_to_hf

        mcore_to_hf.convert(checkpoint, export)

    monkeypatch.setattr(score_checkpoint, "_export", as_if_exported)
    score(folder)
    found = read_scores(folder)
    assert found.values["mme"] is None and "MME" in found.problems["mme"]
    assert found.values["mmbench"] is not None
    assert not (folder / "hf").exists()
