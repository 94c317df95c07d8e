"""What the videos' quickstart does: one more stage of training, on a model of the images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dattn_mcore.config.checks import check_config
from dattn_mcore.config.load import load_config
from dattn_mcore.quickstart.steps import (
    CONFIGS,
    PROCESSES,
    ROOT,
    QuickstartRun,
    Step,
    make_run,
    processes_of,
    python_step,
    train_step,
)

STAGE = "video"
DATA = Path("data/video_digits")
IMAGE_RUN = Path("runs/quickstart")
_OF_IMAGES_TOO = ("train.seed", "train.device")  # settings that the images' stages take as well


def is_finished(run_dir: Path) -> bool:
    """Whether the images' quickstart has left a model in a folder."""
    return any((ROOT / run_dir / "instruct" / "checkpoints").glob("step_*/dattn.json"))


def make_video_run(
    run_dir: Path,
    data: Path,
    image_data: Path,
    overrides: Sequence[str] = (),
    image_run: Path = IMAGE_RUN,
    processes: int = PROCESSES,
    configs: Path = CONFIGS,
) -> QuickstartRun:
    """Turns the settings of the stage into commands.

    Args:
        run_dir: where everything goes; absolute, or relative to `ROOT`, as all folders here.
        data: folder of the digits videos.
        image_data: folder of the digits, for a model of the images that is not there yet.
        overrides: `section.key=value` of the stage; seed and device are the images' as well.
        image_run: of a finished quickstart; where it holds no model, one is trained first.
        processes: that train.
        configs: folder of the settings.

    Raises:
        ConfigError: a setting that is unknown, cannot run, or is not the user's here.
    """
    first: tuple[Step, ...] = ()
    if not is_finished(image_run):
        image_run = run_dir / "image"
        shared = [o for o in overrides if o.partition("=")[0] in _OF_IMAGES_TOO]
        first = make_run(image_run, image_data, shared, processes).steps[:-2]  # no export, answers
    questions, exported = data / "heldout_questions.jsonl", run_dir / "hf"
    answers = run_dir / "answers.jsonl"
    file = configs / "digits_video.yaml"
    own = [
        *overrides,
        f"log.run_dir={run_dir / STAGE}",
        f"checkpoint.init_from={image_run / 'instruct'}",
    ]
    if data != DATA:
        own += [
            f"data.annotations={data / 'video_instruct.json'}",
            f"data.image_folder={data / 'videos'}",
            f"data.tokenizer={data / 'tokenizer.model'}",
        ]
    config = load_config(ROOT / file, own)
    check_config(config)
    prepare = python_step(
        "video-data",
        "make videos of real handwritten digits",
        ("dattn_mcore.data", "prepare-video-digits", "--output", str(data)),
    )
    convert = python_step(
        "convert",
        "export to Hugging Face",
        ("tools.checkpoint_convert", "mcore-to-hf", str(run_dir / STAGE), str(exported)),
    )
    answer = python_step(
        "answer",
        "generate answers to questions about videos of digits never trained on",
        (
            "dattn_mcore.evaluation",
            "answer",
            "--model",
            str(exported),
            "--questions",
            str(questions),
            "--image-folder",
            str(data / "videos"),
            "--answers",
            str(answers),
            "--batch-size",
            "100",
            "--max-new-tokens",
            "8",
            "--device",
            config.train.device,
        ),
    )
    train = train_step(STAGE, file, config, own, processes_of(config, processes))
    return QuickstartRun(
        run_dir=run_dir,
        steps=(*first, prepare, train, convert, answer),
        questions=ROOT / questions,
        image_folder=ROOT / data / "videos",
        answers=ROOT / answers,
        score=ROOT / run_dir / "score.json",
        picture=ROOT / run_dir / "report.png",
        stages=(STAGE,),
    )
