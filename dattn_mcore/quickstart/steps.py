"""What the quickstart does, as a list of commands."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dattn_mcore.config.checks import check_config, processes_per_replica
from dattn_mcore.config.load import load_config
from dattn_mcore.config.schema import Config
from dattn_mcore.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]  # of the cloned repository
STAGES = ("align", "pretrain", "instruct")
PROCESSES = 2  # the quickstart's machine has two cores
CONFIGS = Path("configs")
DATA = Path("data/digits")  # what configs/digits_*.yaml name
_OWN_SETTINGS = (
    "log.run_dir",
    "checkpoint.init_from",
    "train.stage",
    "data.annotations",
    "data.image_folder",
    "data.tokenizer",
    "validation.sources",
)


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: of its log file.
        title: what it does, for the heading.
        command: program and arguments.
        typed: the same, as a user would type it.
    """

    name: str
    title: str
    command: tuple[str, ...]
    typed: str


@dataclass(frozen=True)
class QuickstartRun:
    """The steps, and where they leave their results.

    Attributes:
        stages: of training, whose losses are drawn.
    """

    run_dir: Path
    steps: tuple[Step, ...]
    questions: Path
    image_folder: Path
    answers: Path
    score: Path
    picture: Path
    stages: tuple[str, ...] = STAGES

    def metrics(self, stage: str) -> Path:
        """The measurements of a stage."""
        return self.run_dir / stage / "metrics.jsonl"

    def validation(self, stage: str) -> Path:
        """Its measurements on held-out samples."""
        return self.run_dir / stage / "validation.jsonl"


def make_run(
    run_dir: Path,
    data: Path,
    overrides: Sequence[str] = (),
    processes: int = PROCESSES,
    configs: Path = CONFIGS,
) -> QuickstartRun:
    """Turns the settings of the three stages into commands.

    Args:
        run_dir: where everything goes; absolute, or relative to `ROOT`.
        data: folder of the digits data set, likewise.
        overrides: `section.key=value`, for every stage.
        processes: that train; more where one model needs more.
        configs: folder of the stages' settings; absolute, or relative to `ROOT`.

    Raises:
        ConfigError: a setting that is unknown, cannot run, or is not the user's here.
    """
    if not (ROOT / "pretrain_dattn.py").is_file():
        raise ConfigError(f"{ROOT} is no clone of the repository; run make quickstart in one")
    for override in overrides:
        if override.partition("=")[0] in _OWN_SETTINGS:
            raise ConfigError(
                f"argument {override!r}: the quickstart sets this itself; use --run-dir or --data "
                "for other folders"
            )
    steps, before = [], None
    for stage in STAGES:
        own = [*overrides, f"log.run_dir={run_dir / stage}"]
        if before is not None:
            own.append(f"checkpoint.init_from={before}")
        if data != DATA:
            own += [
                f"data.annotations={data / stage}.json",
                f"data.image_folder={data / 'images'}",
                f"data.tokenizer={data / 'tokenizer.model'}",
            ]
        file = configs / f"digits_{stage}.yaml"
        if data != DATA and load_config(ROOT / file, []).validation.sources:
            own.append(
                f"validation.sources=[{{annotations: {data / f'heldout_{stage}'}.json, "
                f"image_folder: {data / 'images'}}}]"
            )
        config = load_config(ROOT / file, own)
        check_config(config)
        steps.append(train_step(stage, file, config, own, processes_of(config, processes)))
        before = run_dir / stage
    questions, exported = data / "heldout_questions.jsonl", run_dir / "hf"
    answers, score = run_dir / "answers.jsonl", run_dir / "score.json"
    return QuickstartRun(
        run_dir=run_dir,
        steps=(
            python_step(
                "data",
                "draw mosaics of real handwritten digits",
                ("dattn_mcore.data", "prepare-digits", "--output", str(data)),
            ),
            *steps,
            python_step(
                "convert",
                "export to Hugging Face",
                ("tools.checkpoint_convert", "mcore-to-hf", str(before), str(exported)),
            ),
            python_step(
                "answer",
                "generate answers to questions about digits never trained on",
                (
                    "dattn_mcore.evaluation",
                    "answer",
                    "--model",
                    str(exported),
                    "--questions",
                    str(questions),
                    "--image-folder",
                    str(data / "images"),
                    "--answers",
                    str(answers),
                    "--batch-size",
                    "100",
                    "--max-new-tokens",
                    "8",
                    "--device",
                    config.train.device,
                ),
            ),
        ),
        questions=ROOT / questions,
        image_folder=ROOT / data / "images",
        answers=ROOT / answers,
        score=ROOT / score,
        picture=ROOT / run_dir / "report.png",
    )


def processes_of(config: Config, processes: int = PROCESSES) -> int:
    """Processes to start: those that are there, or as many as one model needs."""
    replica = processes_per_replica(config)
    return replica * max(1, processes // replica)


def train_step(
    stage: str, file: Path, config: Config, overrides: Sequence[str], processes: int
) -> Step:
    """A stage of training: `torchrun` over so many processes."""
    parallel = config.parallel
    data_parallel = processes // processes_per_replica(config)
    splits = [
        f"{name} parallel {size}"
        for name, size in (
            ("tensor", parallel.tp),
            ("pipeline", parallel.pp),
            ("context", parallel.cp),
            ("data", data_parallel),
        )
        if size > 1
    ]
    arguments = (
        "--nproc-per-node",
        str(processes),
        "pretrain_dattn.py",
        "--config",
        str(file),
        *overrides,
    )
    return Step(
        stage,
        f"train, stage {stage} ({', '.join(splits) or 'one process'})",
        (sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments),
        f"torchrun {shlex.join(arguments)}",
    )


def python_step(name: str, title: str, arguments: tuple[str, ...]) -> Step:
    """A module of the repository, run as a command."""
    command = (sys.executable, "-m", *arguments)
    return Step(name, title, command, f"python -m {shlex.join(arguments)}")
