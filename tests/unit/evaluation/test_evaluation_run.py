"""Runs over all twelve benchmarks: what is written, batches, resuming, and bad input."""

import errno
import fcntl
import json
import os
import shutil

import pytest

from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.__main__ import main
from dattn_mcore.evaluation.benchmarks import ALL
from dattn_mcore.evaluation.benchmarks.gqa import Gqa
from dattn_mcore.evaluation.benchmarks.mmbench import MmBench
from dattn_mcore.evaluation.benchmarks.vqav2 import Vqav2
from dattn_mcore.evaluation.run_folder import RunFolder
from tests.unit.evaluation import trees
from tests.unit.evaluation.conftest import ROOT
from tests.unit.evaluation.judge_server import JudgeServer
from tests.unit.evaluation.tiny_runs import answers, run, scores

ROWS = {"scienceqa": 3, "mme": 8, "pope": 6, "llava-bench": 3, "vqav2": 9, "mmbench": 4}  # others 2


def test_a_run_answers_everything(whole, tiny_model):
    """LLaVA's form, in the order of the questions, with a score or a submission each."""
    found = answers(whole)
    assert set(found) == {kind.name for kind in ALL}
    for kind in ALL:
        records = [json.loads(line) for line in found[kind.name].splitlines()]
        rows = kind(tiny_model / "val").rows
        assert len(records) == ROWS.get(kind.name, 2)
        assert [r["question_id"] for r in records] == [r.question_id for r in rows]
        assert [r["prompt"] for r in records] == [r.prompt for r in rows]
        assert all({"text", "answer_id", "model_id", "metadata"} <= set(r) for r in records)
    texts = {json.loads(line)["text"] for file in found.values() for line in file.splitlines()}
    assert len(texts) > 10  # the model answers differently to different rows
    assert not list((whole / "answers/parts").rglob("*.jsonl"))


def test_the_json_says_what_the_scores_depend_on(whole, tiny_model):
    found = scores(whole)
    about = found["run"]
    assert about["model"] == str(tiny_model / "tiny")
    assert "[INST]" in about["template"]
    assert about["decoding"]["dtype"] == "float32" and about["decoding"]["batch_size"] == 8
    assert {"torch", "transformers", "dattn_mcore", "pillow"} <= set(about["versions"])
    states = {name: entry["status"] for name, entry in found["benchmarks"].items()}
    unscored = {"llava-bench": "answered", "mm-vet": "submission"}
    unscored |= {"vqav2": "submission", "vizwiz": "submission"}
    assert states == {kind.name: unscored.get(kind.name, "scored") for kind in ALL}
    assert found["benchmarks"]["gqa"]["prompt"].startswith("<s>[INST] <image>\nWhat is red?\nAns")
    assert found["benchmarks"]["gqa"]["max_new_tokens"] == 6
    for name in ("vqav2", "vizwiz", "mmbench", "mme", "gqa", "seed", "mm-vet"):
        assert (whole / "submissions" / name).is_dir()


def test_score_of_a_run_again(whole, tiny_model, tmp_path):
    """The answer files of a run give its scores, by the command for answers that exist."""
    for name in ("scienceqa", "mme", "pope", "textvqa", "mmstar", "mmbench", "seed", "gqa"):
        arguments = [f"--benchmark={name}", f"--data={tiny_model / 'val'}"]
        arguments += [f"--answers={whole / 'answers' / name}.jsonl", f"--json={tmp_path / name}"]
        assert main(["score", *arguments]) == 0
        again = json.loads((tmp_path / name).read_text())[name]
        entry = scores(whole)["benchmarks"][name]
        assert (again["value"], again["figures"]) == (entry["value"], entry["figures"])


def test_batch_size_changes_no_answer(whole, tiny_model, tmp_path):
    """Greedy in float32: batches of 8 and rows alone give the same answers.

    Padding is masked, so a row's logits differ between batches by rounding only (1e-6 of logits of
    order one); the random model's best two tokens lie further apart.
    """
    assert run(tiny_model, tmp_path / "one", "--batch-size=1") == 0
    assert answers(tmp_path / "one") == answers(whole)


def test_resume(whole, tiny_model, tmp_path):
    """Half of the answers, a cut line, and another batch size: nothing is answered twice or lost."""
    out = tmp_path / "half"
    shutil.copytree(whole, out)
    marked = 0
    for path in sorted((out / "answers").glob("*.jsonl")):
        kept = [json.loads(line) for line in path.read_text().splitlines()][::2]
        for record in kept:
            record["text"] = "KEPT"  # would be lost if the row were answered again
            marked += 1
        part = trees.lines(out / "answers/parts" / path.stem / "5.jsonl", kept)
        with part.open("a") as file:
            file.write('{"question_id": "cut')  # what a kill leaves
        path.unlink()
    assert run(tiny_model, out, "--batch-size=3") == 0
    resumed, undisturbed = answers(out), answers(whole)
    assert set(resumed) == set(undisturbed)
    kept = 0
    for name, text in resumed.items():
        pairs = zip(text.splitlines(), undisturbed[name].splitlines(), strict=True)
        for number, (now, then) in enumerate(pairs):
            kept += '"KEPT"' in now
            assert ('"KEPT"' in now) == (number % 2 == 0)
            assert now == then or '"KEPT"' in now
    assert kept == marked == 24
    before = answers(out)
    assert run(tiny_model, out) == 0  # all is answered: only scored again
    assert answers(out) == before


def test_a_run_with_a_judge(whole, tiny_model, tmp_path):
    """A finished run is judged afterwards without answering again; a refusal fails alone."""
    out = tmp_path / "judged"
    shutil.copytree(whole, out)
    before = answers(out)
    names = "--benchmarks=llava-bench,mm-vet,gqa"
    with JudgeServer(lambda asked, body: "8 4" if body["max_tokens"] > 3 else 403) as server:
        judge = [f"--judge-url={server.url}", "--judge-model=m", "--judge-parallel=1"]
        assert run(tiny_model, out, names, *judge) == 1
    found = scores(out)["benchmarks"]
    assert found["llava-bench"]["value"] == 50 and "judge m" in found["llava-bench"]["note"]
    assert found["mm-vet"]["status"] == "failed" and "refuses (403" in found["mm-vet"]["error"]
    assert found["gqa"]["status"] == "scored" and answers(out) == before
    assert (out / "reviews/llava-bench.jsonl").is_file() and (out / "report.html").is_file()


def test_a_folder_belongs_to_one_model_and_data(whole, tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    other = tmp_path / "other"
    shutil.copytree(tiny_model / "tiny", other)
    config = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**config, "top_k": 7}))
    arguments = ["run", f"--data={tiny_model / 'val'}", f"--out={out}", "--max-new-tokens=6"]
    assert main([*arguments, f"--model={other}"]) == 2
    assert "holds answers with model " in last_error(capsys)
    assert run(tiny_model, out, "--dtype=bfloat16") == 2
    assert "holds answers with dtype 'auto', this run has 'bfloat16'" in last_error(capsys)
    assert run(tiny_model, out, "--max-new-tokens=9", "--benchmarks=gqa") == 1
    failed = scores(out)["benchmarks"]["gqa"]["error"]
    assert "was generated with" in failed and "give another --out" in failed
    data = tmp_path / "val"
    trees.make_tree(data)
    path = data / "gqa/llava_gqa_testdev_balanced.jsonl"
    path.write_text(path.read_text().replace("red", "blue"))
    assert run(tiny_model, out, "--benchmarks=gqa", data=data) == 1
    assert "holds answers to other questions" in scores(out)["benchmarks"]["gqa"]["error"]


def test_a_model_that_cannot_be_loaded_takes_no_folder(tiny_model, tmp_path, capsys):
    """The right model is not refused afterwards."""
    broken = shutil.copytree(tiny_model / "tiny", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"cut")
    out, more = tmp_path / "out", ("--benchmarks=gqa", "--max-new-tokens=2", "--device=cpu")
    arguments = ["run", f"--data={tiny_model / 'val'}", f"--out={out}", *more]
    assert main([*arguments, f"--model={broken}"]) == 2
    assert "cannot be loaded" in last_error(capsys)
    assert run(tiny_model, out, *more) == 0


def test_a_folder_that_cannot_be_locked(tmp_path, monkeypatch, caplog):
    """As on some network file systems: said once, and used; a folder in use is still refused."""
    with_locks, first, second = fcntl.flock, RunFolder(tmp_path), RunFolder(tmp_path)
    first.claim({"model": "m"})
    with pytest.raises(DataError, match="is being written by another run"):
        second.claim({"model": "m"})

    def without_locks(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without_locks)
    second.claim({"model": "m"})
    assert caplog.text.count("cannot be locked (No locks available)") == 1
    second.settle({"model": "m"})
    monkeypatch.setattr(fcntl, "flock", with_locks)
    assert first.lock is not None
    first.lock.close()
    with pytest.raises(DataError, match="holds answers with model 'm', this run has 'n'"):
        RunFolder(tmp_path).claim({"model": "n"})


def last_error(capsys) -> str:
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def test_what_fails_leaves_the_others_alone(tiny_model, tree, tmp_path, capsys):
    """A missing image, a missing annotation file, a damaged image, a broken file, no folder."""
    (tree / "gqa/data/images/n1.jpg").unlink()
    (tree / "textvqa/TextVQA_0.5.1_val.json").unlink()
    whole = (tree / "vizwiz/test/VizWiz_test_1.jpg").read_bytes()
    (tree / "vizwiz/test/VizWiz_test_1.jpg").write_bytes(whole[: len(whole) // 2])
    (tree / "pope/llava_pope_test.jsonl").write_text('{"question_id": 1, "text"\n')
    shutil.rmtree(tree / "mmstar")
    (tree / "MME/llava_mme.jsonl").write_bytes(b"\xff\xfe")
    names = "gqa,textvqa,vizwiz,pope,mmstar,mme,vqav2,scienceqa"
    assert run(tiny_model, tmp_path / "out", f"--benchmarks={names}", data=tree) == 1
    shown = " ".join(capsys.readouterr().out.split())
    found = scores(tmp_path / "out")["benchmarks"]
    for name, message in {
        "gqa": "GQA: 1 of 2 images are not there (first: 'n1.jpg'",
        "textvqa": "TextVQA_0.5.1_val.json cannot be read (No such file",
        "vizwiz": "VizWiz, question 1: image 'VizWiz_test_1.jpg' cannot be decoded",
        "pope": "llava_pope_test.jsonl:1: is not JSON",
        "mmstar": "is no folder; put the files of MMStar there",
        "mme": "is not UTF-8 text",
    }.items():
        assert found[name]["status"] == "failed"
        assert message in found[name]["error"] and "\n" not in found[name]["error"]
    assert (found["vqav2"]["status"], found["scienceqa"]["status"]) == ("submission", "scored")
    assert shown.count("failed:") == 6
    # TextVQA was answered; with its annotations it is scored without being asked again.
    trees.textvqa(tree / "textvqa")
    assert (
        run(tiny_model, tmp_path / "out", "--benchmarks=textvqa", "--as-original", data=tree) == 0
    )
    # The others' scores stay, with the options that they were made with; so in table and report.
    shown = " ".join(capsys.readouterr().out.split())
    again = scores(tmp_path / "out")
    assert set(again["benchmarks"]) == set(found) and again["run"]["options"]["as_original"]
    assert again["benchmarks"]["textvqa"]["status"] == "scored"
    assert "earlier" not in again["benchmarks"]["textvqa"]
    for name in set(found) - {"textvqa"}:
        earlier = again["benchmarks"][name].pop("earlier")
        assert not earlier["options"]["as_original"] and "model" not in earlier
        assert again["benchmarks"][name] == found[name]
    assert shown.count("failed:") == 5 and "ScienceQA" in shown
    assert "ScienceQA" in (tmp_path / "out/report.html").read_text()


def test_a_defect_costs_one_benchmark(whole, tiny_model, tmp_path, monkeypatch):
    """Its traceback is kept, the others are scored; a score needs no submission."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)

    def broken(error):
        def raises(*arguments):
            raise error

        return raises

    monkeypatch.setattr(Gqa, "score", broken(TypeError("two\nlines")))
    monkeypatch.setattr(MmBench, "submit", broken(DataError("openpyxl is missing")))
    monkeypatch.setattr(Vqav2, "submit", broken(KeyError("q")))
    assert run(tiny_model, out, "--benchmarks=gqa,mmbench,vqav2,pope") == 1
    found = scores(out)["benchmarks"]
    log = out / "errors-0.log"
    assert found["gqa"]["error"] == f"internal error: TypeError: two lines; see {log}"
    assert found["vqav2"]["error"] == f"internal error: KeyError: 'q'; see {log}"
    assert [log.read_text().count(x) for x in ("Traceback", "in raises", "gqa\n")] == [2, 2, 1]
    assert found["pope"]["status"] == found["mmbench"]["status"] == "scored"
    assert found["mmbench"]["note"].startswith("no submission: openpyxl is missing")
    assert found["mmbench"]["value"] == scores(whole)["benchmarks"]["mmbench"]["value"]


def test_a_full_disk(tiny_model, tmp_path, monkeypatch):
    """One line; what is answered later goes on from there."""

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert run(tiny_model, tmp_path / "out", "--benchmarks=gqa") == 1
    error = scores(tmp_path / "out")["benchmarks"]["gqa"]["error"]
    assert "gqa/0.jsonl cannot be written (No space left on device)" in error
    assert run(tiny_model, tmp_path / "out", "--benchmarks=gqa") == 0


def test_bad_arguments(tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(tiny_model, out, "--benchmarks=popo") == 2
    assert "did you mean pope?" in last_error(capsys)
    data = f"--data={tiny_model / 'val'}"
    assert main(["run", data, f"--model={tmp_path}", f"--out={out}"]) == 2
    assert "has no config.json" in last_error(capsys)
    assert not out.exists()
    pope = tiny_model / "whole/answers/pope.jsonl"
    assert main(["score", data, "--benchmark=gqa", f"--answers={pope}"]) == 2
    assert "6 of 6 answers are to questions that GQA does not ask" in last_error(capsys)
    assert main(["score", data, "--benchmark=vizwiz", f"--answers={pope}"]) == 2
    last_error(capsys)
    assert main(["score", data, "--benchmark=gqa"]) == 2
    assert "--answers is missing" in last_error(capsys)
    assert main(["score", data, "--benchmark=gqa", "--answers=none.jsonl"]) == 2
    assert "--answers none.jsonl cannot be read" in last_error(capsys)
    assert main(["check", "--data=nowhere"]) == 2
    assert "--data nowhere is no folder" in last_error(capsys)


def test_check(tree, capsys):
    """All usable and, so small, partial; then what is missing, by name."""
    assert main(["check", f"--data={tree}"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("partial") == 12 and "1 rows have no image" in shown
    (tree / "scienceqa/images/test/2/image.png").unlink()
    (tree / "scienceqa/problems.json").unlink()
    (tree / "seed_bench/SEED-Bench.json").write_text("[]")
    path = tree / "pope/coco/coco_pope_popular.json"
    path.write_text(path.read_text().replace("thing 1", "thing 9"))
    (tree / "gqa/data/images/n0.jpg").rename(tree / "gqa/data/images/n0.JPG")
    shutil.rmtree(tree / "mm-vet")
    assert main(["check", f"--data={tree}"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("partial") == 7
    for message in (
        "problems.json is missing; 1 images are missing (first: 2/image.png)",
        "SEED-Bench.json is no SEED-Bench annotation file",
        "1 images are missing (first: n0.jpg)",
        "popular.json has no label for image",
        "mm-vet is no folder",
    ):
        assert message in shown


def test_images_stay_inside(tree):
    from dattn_mcore.evaluation.benchmarks import make_benchmark

    path = tree / "vizwiz/llava_test.jsonl"
    path.write_text(path.read_text().replace("VizWiz_test_1", "../../secret"))
    with pytest.raises(DataError, match="leads outside"):
        _ = make_benchmark("vizwiz", tree).rows


def test_no_megatron():
    """The evaluation needs the exported folder, PyTorch and transformers, nothing of the trainer."""
    import ast

    files = list((ROOT / "dattn_mcore/evaluation").rglob("*.py"))
    ours = tuple(
        f"dattn_mcore.{room}" for room in ("evaluation", "errors", "types", "console", "log", "hf")
    )
    # What guessing gives there, with numpy alone; why an image cannot be read, with Pillow alone.
    # Which base an adapter is of, with PyTorch and safetensors; whether a package or a GPU works.
    light = (
        "dattn_mcore.data.digits_questions",
        "dattn_mcore.data.image_signatures",
        "dattn_mcore.checkpoint.base_sums",
        "dattn_mcore.parallel.packages",
        "dattn_mcore.parallel.gpus",
    )
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert not name.startswith("megatron"), path
                allowed = name.startswith(ours) or name in light
                assert not name.startswith("dattn_mcore.") or allowed, path
    assert len(files) > 30
