"""What evaluation questions need, looked at before the first step."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from dattn_mcore.config.schema import Config, ScoresConfig
from dattn_mcore.errors import ConfigError, DataError, DattnError
from dattn_mcore.evaluation.benchmarks import Options, make_benchmark
from dattn_mcore.evaluation.benchmarks.base import check_pictures
from dattn_mcore.evaluation.exact_match import check_expected
from dattn_mcore.evaluation.images import check_images
from dattn_mcore.evaluation.questions import part_of, read_questions
from dattn_mcore.parallel.gpus import gpu_problem


def check_scores(config: Config) -> None:
    """Reads all questions that a run asks, and sees that images and true answers are there.

    Raises:
        ConfigError: a folder, a file, a device or a package is not there.
        DataError: a file is malformed, or an image or a true answer is missing.
    """
    settings = config.scores
    if importlib.util.find_spec("tools.checkpoint_convert") is None:
        raise ConfigError(
            "scores need tools.checkpoint_convert, which is not found; install dattn-mcore again"
        )
    needs_gpu = settings.device == "gpu"
    if needs_gpu and torch.accelerator.current_accelerator(check_available=True) is None:
        why = gpu_problem() or "this machine has none"
        raise ConfigError(
            f"scores.device=gpu needs a GPU that PyTorch can see: {why}; use scores.device=cpu"
        )
    if settings.benchmarks and not Path(settings.data).is_dir():
        raise ConfigError(
            f"scores.data={settings.data} is no folder; give the one that holds the folders of "
            "all benchmarks"
        )
    for name in settings.benchmarks:
        try:
            _check_benchmark(name, settings)
        except DattnError as error:
            raise DataError(f"scores.benchmarks has {name}: {error}") from None
    if settings.questions is not None:
        _check_questions(settings.questions, settings)


def _check_benchmark(name: str, settings: ScoresConfig) -> None:
    benchmark = make_benchmark(name, settings.data, Options(limit=settings.samples))
    check_pictures(benchmark, range(len(benchmark.rows)))
    benchmark.check_truth()
    if why := benchmark.unscored():
        raise ConfigError(f"{why}, after training; leave it out here")


def _check_questions(path: str, settings: ScoresConfig) -> None:
    name = f"scores.questions={path}"
    if not Path(path).is_file():
        raise ConfigError(
            f"{name} is no file; give JSON lines with question_id, text, answer, and image where "
            "there is one"
        )
    try:
        questions = read_questions(path)
        check_expected(questions, path)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    asked = part_of(questions, settings.samples)
    pairs = [(f"{path}:{q.line}", image) for q in asked for image in q.images]
    if not pairs:
        return
    if settings.image_folder is None or not Path(settings.image_folder).is_dir():
        value = "null" if settings.image_folder is None else settings.image_folder
        raise ConfigError(
            f"scores.image_folder={value} is no folder; give the one that the image paths of "
            f"{name} start in"
        )
    check_images(settings.image_folder, pairs)
