"""The digits task in every precision: it is learned, as it is in float32.

All three stages as `configs/digits_*.yaml` have them, on one GPU, twice as long; then export, and
answers in float32. About a minute each. Two trainings that round differently end at different
weights, so their accuracies are not compared with each other: what one step of each precision may
differ by is the business of test_gpu.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dattn_mcore.data.digits import DigitsSizes, prepare_digits
from dattn_mcore.evaluation.digits_score import score_digits
from dattn_mcore.quickstart.expectation import LEAST
from dattn_mcore.training.implementation import transformer_engine_missing

ROOT = Path(__file__).parents[2]
STEPS = {"align": 200, "pretrain": 600, "instruct": 1200}
# Blocks of 128 divide it; the embedded 352 they do not.
SIZES = ["model.llm.ffn_hidden_size=384"]
PRECISIONS = {
    "fp32": ["train.precision=fp32"],
    "bf16-local": ["train.precision=bf16", "train.transformer_impl=local"],
    "bf16-te": ["train.precision=bf16", "train.transformer_impl=transformer_engine"],
    **{
        recipe: ["train.precision=bf16", f"train.fp8={recipe}"]
        for recipe in ("delayed", "tensorwise", "blockwise")
    },
}


def accuracy(data, folder, device, settings, steps=STEPS):
    """Share of right answers after the three stages, in processes of their own."""

    def run(*command):
        subprocess.run(
            [sys.executable, *map(str, command)],
            check=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    before = []
    for stage, number in steps.items():
        run(
            "pretrain_dattn.py",
            "--config",
            f"configs/digits_{stage}.yaml",
            "--tp",
            "1",
            "--pp",
            "1",
            "--device",
            device,
            f"train.steps={number}",
            *before,
            f"data.annotations={data / stage}.json",
            f"data.image_folder={data / 'images'}",
            f"data.tokenizer={data / 'tokenizer.model'}",
            f"log.run_dir={folder / stage}",
            "log.tensorboard=false",
            *SIZES,
            *settings,
        )
        before = [f"checkpoint.init_from={folder / stage}"]
    run("-m", "tools.checkpoint_convert", "mcore-to-hf", folder / "instruct", folder / "hf")
    questions, answers = data / "heldout_questions.jsonl", folder / "answers.jsonl"
    run(
        "-m",
        "dattn_mcore.evaluation",
        "answer",
        "--model",
        folder / "hf",
        "--questions",
        questions,
        "--image-folder",
        data / "images",
        "--answers",
        answers,
        "--batch-size",
        "100",
        "--max-new-tokens",
        "8",
        "--device",
        device,
    )
    return score_digits(questions, answers).overall.accuracy


@pytest.fixture(scope="module")
def many_questions(tmp_path_factory):
    """The embedded data set with 4,000 questions: chance moves an accuracy by 0.5 % then."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    return prepare_digits(folder, DigitsSizes(heldout=4000))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_task_is_learned(many_questions, tmp_path, precision):
    missing = transformer_engine_missing()
    if missing is not None and precision not in ("fp32", "bf16-local"):
        pytest.skip(f"needs Transformer Engine: {missing}")
    assert accuracy(many_questions, tmp_path, "gpu", PRECISIONS[precision]) >= LEAST
