"""Which packages are installed, in which versions, and whether they can be imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from typing import NamedTuple

from dattn_mcore.config.schema import Config
from dattn_mcore.doctor.imports import Imports
from dattn_mcore.doctor.report import Row


class Package(NamedTuple):
    """A package that this project can use.

    Attributes:
        name: what people call it.
        module: what is imported.
        distributions: names under which it is installed; the first one with its range of versions.
        use: what it is for.
        install: the command that gets it.
        of_gpus: it is of use on a machine with a GPU only.
        alone: it is compiled against others and can end the process that imports it.
        only_for: it takes seconds to import, and is tried where this setting of `log` is on; empty:
            always.
    """

    name: str
    module: str
    distributions: tuple[str, ...]
    use: str
    install: str
    of_gpus: bool = False
    alone: bool = False
    only_for: str = ""

    def tried(self, config: Config) -> bool:
        """Whether its import is tried for a configuration."""
        return not self.only_for or bool(getattr(config.log, self.only_for, False))

    def installed(self) -> bool:
        """Whether it is there; imports none of its own code."""
        try:
            return importlib.util.find_spec(self.module.split(".")[0]) is not None and (
                "." not in self.module or importlib.util.find_spec(self.module) is not None
            )
        except (ImportError, ValueError):  # a parent that fails, a module without a spec
            return True

    def version(self) -> str:
        """The installed version; empty where the package does not say."""
        for name in self.distributions:
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return ""


_OURS = "pip install dattn-mcore"
# Those that every run needs; Megatron-Core is imported by `choices`, as the trainer does.
NEEDED = (
    Package("torch", "torch", ("torch",), "computes", _OURS),
    Package("transformers", "transformers", ("transformers",), "exports", _OURS),
    Package("tokenizers", "tokenizers", ("tokenizers",), "Hugging Face tokenizers", _OURS),
    Package("sentencepiece", "sentencepiece", ("sentencepiece",), "tokenizer.model", _OURS),
    Package("safetensors", "safetensors", ("safetensors",), "weights", _OURS),
    Package("pillow", "PIL", ("pillow",), "decodes images", _OURS),
)
MEGATRON = Package("megatron-core", "megatron.core", ("megatron-core",), "trains", _OURS)
_COMPILED = "pip install --no-build-isolation"
OPTIONAL = (
    Package(
        "triton",
        "triton",
        ("triton",),
        "attention on a GPU",
        "pip install 'dattn-mcore[triton]'",
        of_gpus=True,
    ),
    Package(
        "transformer-engine",
        "transformer_engine",
        ("transformer-engine", "transformer-engine-torch"),
        "linears, norms, FP8, Adam on a GPU",
        f"{_COMPILED} 'dattn-mcore[te]'",
        of_gpus=True,
        alone=True,
    ),
    Package(
        "flash-attn 2",
        "flash_attn",
        ("flash-attn",),
        "attention on a GPU",
        f"{_COMPILED} 'dattn-mcore[flash]'",
        of_gpus=True,
        alone=True,
    ),
    Package(
        "flash-attn 3",
        "flash_attn_interface",
        ("flash-attn-3", "flash_attn_interface", "flash-attn-hopper"),
        "attention on Hopper",
        "build the folder hopper/ of flash-attention's repository",
        of_gpus=True,
        alone=True,
    ),
    Package(
        "Apex",
        "apex",
        ("apex",),
        "fused Adam without Transformer Engine",
        "build NVIDIA's repository; the package index has another apex",
        of_gpus=True,
        alone=True,
    ),
    Package(
        "DALI",
        "nvidia.dali",
        ("nvidia-dali-cuda120", "nvidia-dali-cuda130"),
        "decodes images, on a CPU too",
        "pip install 'dattn-mcore[dali]'",
    ),
    Package(
        "pyarrow", "pyarrow", ("pyarrow",), "parquet files", "pip install 'dattn-mcore[parquet]'"
    ),
    Package(
        "pillow-heif",
        "pillow_heif",
        ("pillow-heif",),
        "HEIC images",
        "pip install 'dattn-mcore[heif]'",
    ),
    Package("PyAV", "av", ("av",), "videos", "pip install 'dattn-mcore[video]'"),
    Package(
        "peft",
        "peft",
        ("peft",),
        "answers with adapters",
        "pip install 'dattn-mcore[adapters]'",
        only_for="peft",  # no setting of a run: the evaluation says itself what it lacks
    ),
    Package("tensorboard", "tensorboard", ("tensorboard",), "log.tensorboard", _OURS),
    Package(
        "wandb",
        "wandb",
        ("wandb",),
        "log.wandb",
        "pip install 'dattn-mcore[trackers]'",
        only_for="wandb",
    ),
    Package(
        "mlflow",
        "mlflow",
        ("mlflow-skinny", "mlflow"),
        "log.mlflow",
        "pip install 'dattn-mcore[trackers]'",
        only_for="mlflow",
    ),
)


class Packages:
    """All packages; their imports are tried side by side with what else is done."""

    def __init__(self, config: Config) -> None:
        """Starts to import what is there.

        Args:
            config: a checked configuration.
        """
        self._config = config
        there = [one for one in (*NEEDED, *OPTIONAL) if one.installed() and one.tried(config)]
        together = [package.module for package in there if not package.alone]
        self._tries = [Imports(together)]
        self._tries += [Imports([package.module]) for package in there if package.alone]

    def rows(self, megatron: Mapping[str, str | None]) -> tuple[list[Row], list[str], list[str]]:
        """Waits for the imports.

        Args:
            megatron: Megatron-Core's module, and why it cannot be imported or None; empty where
                that was not tried.

        Returns:
            Rows; what every run needs and cannot import, a line each; optional packages that are
            not installed or cannot be imported, by name.
        """
        problems = dict(megatron)
        for tried in self._tries:
            problems |= tried.problems()
        listed = (*NEEDED[:1], MEGATRON, *NEEDED[1:], *OPTIONAL)
        rows = [_row(package, problems) for package in listed]
        unusable = [
            f"{package.name} {_trouble(package, problems)}; {package.install}"
            for package in (*NEEDED, MEGATRON)
            if _trouble(package, problems) is not None
        ]
        absent = [one.name for one in OPTIONAL if _trouble(one, problems) is not None]
        return rows, unusable, absent


def _trouble(package: Package, problems: Mapping[str, str | None]) -> str | None:
    if not package.installed():
        return "is not installed"
    problem = problems.get(package.module)
    return None if problem is None else f"cannot be imported ({problem})"


def _row(package: Package, problems: Mapping[str, str | None]) -> Row:
    if not package.installed():
        return Row(package.name, "not installed", package.use)
    version = package.version()
    problem = problems.get(package.module)
    if problem is not None:
        return Row(package.name, version or "installed", f"BROKEN, its import fails: {problem}")
    allowed = allowed_range(package.distributions[0])
    if version and allowed and not within(version, allowed):
        note = f"outside of {allowed}, with which this release is tested"
        return Row(package.name, version, note)
    note = package.use
    if package.module not in problems:
        note += "; not imported" + (", these settings do not use it" if package.only_for else "")
    return Row(package.name, version or "installed", note)


def allowed_range(distribution: str) -> str:
    """The range of versions that this project's metadata allows; empty where it says nothing."""
    try:
        asked = importlib.metadata.requires("dattn-mcore") or []
    except importlib.metadata.PackageNotFoundError:  # a clone that was not installed
        return ""
    for requirement in asked:
        name = re.split(r"[\[<>=!~; ]", requirement)[0]
        if _plain(name) == _plain(distribution):
            found = re.search(r"[<>=!~]=?[\d.,<>=!~ ]+", requirement.split(";")[0])
            return found[0].strip() if found else ""
    return ""


def within(version: str, allowed: str) -> bool:
    """Whether a version is within a range of `==`, `>=` and `<`, by its numbers alone."""
    number = _numbers(version)
    for clause in allowed.split(","):
        found = re.fullmatch(r"\s*(==|>=|<=|<|>)\s*([\d.]+)\s*", clause)
        if found is None:
            continue
        bound = _numbers(found[2])
        size = max(len(number), len(bound))
        left, right = (one + (0,) * (size - len(one)) for one in (number, bound))
        holds = {
            "==": left == right,
            ">=": left >= right,
            "<=": left <= right,
            "<": left < right,
            ">": left > right,
        }
        if not holds[found[1]]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
