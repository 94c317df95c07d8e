"""What runs under one release of Megatron-Core, in a process of its own.

Usage: python -m tests.megatron.jobs SETTINGS, a JSON object of a job's arguments by its name.
Prints a JSON object of what they return.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.abc
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

warnings.filterwarnings("ignore")

import torch  # noqa: E402
from packaging.version import Version  # noqa: E402

from dattn_mcore.parallel import entry, packages, platform, torch_adam  # noqa: E402
from dattn_mcore.parallel.announcements import ANNOUNCEMENTS  # noqa: E402

ROOT = Path(__file__).parents[2]
GPU = "cu" + "da"  # the word itself belongs to parallel/platform.py and its like
OPTIONAL = ".extensions.transformer_engine"  # names there need that package
# Other things that `platform.install` replaces, and what Megatron-Core says where it needs them.
OTHER_SHIMS = {
    f"Tensor.{GPU}": f".{GPU}()",
    "Tensor.type": f"torch.{GPU}.FloatTensor",
    "set_rng_state": f"_set_{GPU}_rng_state(",
    "random.get_rng_state": f"torch.{GPU}.random.get_rng_state",
    "device=": f'device="{GPU}"',
    "warning of the tracker": "CPU RNG state changed within GPU RNG context",
}


def version() -> str:
    """Of the release that this process has, without the commit of the repository it lies in."""
    from megatron.core import __version__

    return Version(__version__).public


def imports() -> dict[str, str]:
    """Names of Megatron-Core that the project imports and this release lacks, and why."""
    missing = {}
    files = [*(ROOT / "dattn_mcore").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("megatron."):
            continue
        for name in (alias.name for alias in node.names):
            problem = _problem(str(node.module), name)
            if problem is not None:
                missing[f"{node.module}.{name}"] = problem
    return missing


def _problem(module: str, name: str) -> str | None:
    if module.endswith(OPTIONAL):
        return None
    try:
        if not hasattr(importlib.import_module(module), name):
            importlib.import_module(f"{module}.{name}")
    except Exception as error:  # noqa: BLE001 (a release for another Python raises anything)
        return f"{type(error).__name__}: {error}"
    return None


def shims(replaced: list[str]) -> list[str]:
    """What the CPU platform replaces or hides and this release never mentions."""
    package = Path(importlib.import_module("megatron.core").__path__[0])
    text = "\n".join(file.read_text(encoding="utf-8") for file in package.rglob("*.py"))
    mentions = {name: f"{GPU}.{name}" for name in replaced} | OTHER_SHIMS
    return [name for name, mention in mentions.items() if mention not in text]


def announcements() -> list[str]:
    """Loggers that `parallel.announcements` filters and whose module here has such a message."""
    said = []
    for name, message in ANNOUNCEMENTS.items():
        file = importlib.import_module(name).__file__
        if message in Path(str(file)).read_text(encoding="utf-8"):
            said.append(name)
    return said


class _Absent(importlib.abc.MetaPathFinder):
    """Notes which absent packages Megatron-Core tries; comes last, so that it is asked for those."""

    def __init__(self) -> None:
        self.tried: set[str] = set()

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        """Finds nothing."""
        frame: Any = sys._getframe(1)
        while frame and frame.f_globals.get("__name__", "").startswith("importlib."):
            frame = frame.f_back
        if frame and frame.f_globals.get("__name__", "").startswith("megatron."):
            self.tried.add(fullname.partition(".")[0])


_ABSENT = _Absent()


def tried() -> list[str]:
    """Absent packages that Megatron-Core tries on the way to what this project imports.

    Those that are installed are not among them; the same list needs them on another machine.
    """
    for module in ("dattn_mcore.training.loop", "dattn_mcore.checkpoint.save"):
        importlib.import_module(module)
    known = {name.partition(".")[0] for name in packages.TRIED_BY_MEGATRON}
    known |= {"megatron", platform.ADDS_GRADIENTS}
    return sorted(_ABSENT.tried - known)


def own_save(folder: str) -> list[str]:
    """Byte entries of a checkpoint of a tensor and a number that Megatron-Core's `save` writes."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    from dattn_mcore.checkpoint.metadata import read_metadata
    from dattn_mcore.parallel.groups import single_process

    Path(folder).mkdir(parents=True)
    with single_process():
        tensor = ShardedTensor.from_rank_offsets("weight", torch.ones(2), replica_id=0)
        dist_checkpointing.save({"weight": tensor, "step": 1}, folder)
    entries = read_metadata(Path(folder)).state_dict_metadata
    return [name for name, entry in entries.items() if isinstance(entry, BytesStorageMetadata)]


def fixes(data: str) -> dict[str, bool]:
    """Whether each fix of `parallel.torch_adam` is needed: what fails without them."""
    from dattn_mcore.checkpoint import state
    from tests.unit.checkpoint.runs import small_run

    with (
        mock.patch.object(torch_adam, "install", lambda: None),
        small_run(Path(data) / "unfixed/checkpoints", _small(data)) as run,
    ):
        (part,) = getattr(run.optimizer, "chained_optimizers", [run.optimizer])
        model = state.model_state(run.chunks, run.groups)
        options = state.metadata(run.groups)
        found = {
            "1: state_dict without state": _fails(part.state_dict),
            "2: sharded_state_dict without state": _fails(
                lambda: run.optimizer.sharded_state_dict(model, is_loading=True, metadata=options)
            ),
        }
        run.step(1)
        run.saver.save(1)
        found["3: step is loaded as a tensor"] = _fails(run.resume)
        run.step(2)
        part.load_state_dict(part.state_dict())
        steps = {id(values["step"]) for values in part.optimizer.state.values()}
        found["4: one step for all parameters"] = len(steps) == 1
    return found


def _fails(call: Callable[[], Any]) -> bool:
    try:
        call()
    except Exception:  # noqa: BLE001 (an assertion, a KeyError, a StopIteration ...)
        return True
    return False


def train(data: str, run_dir: str) -> list[list[float]]:
    """Loss and gradient norm of three steps of a small model."""
    from tests.distributed.jobs import read_metrics, run_training
    from tests.distributed.small_models import GEMMA, small_config

    with _world():
        run_training(small_config(Path(data), Path(run_dir), model=GEMMA))
    return [[row["loss"], row["grad_norm"]] for row in read_metrics(run_dir)]


@contextlib.contextmanager
def _world() -> Any:
    """A world of this process alone, whose model parallel groups the run makes."""
    import torch.distributed as dist

    from dattn_mcore.parallel.groups import destroy_model_parallel, initialize_alone

    initialize_alone("cpu")
    yield
    destroy_model_parallel()
    dist.destroy_process_group()


def save(data: str) -> str:
    """Two updates, each saved, and one more; a digest of the weights."""
    from tests.unit.checkpoint.runs import small_run

    with small_run(Path(data) / "checkpoints", _small(data)) as run:
        for step in (1, 2):
            run.step(step)
            run.saver.save(step)
        run.step(3)
        return _digest(run.weights())


def resume(data: str) -> str:
    """The third update from a checkpoint of the second, as `save` does it."""
    from tests.unit.checkpoint.runs import small_run

    with small_run(Path(data) / "checkpoints", _small(data)) as run:
        assert run.resume() == 2
        run.step(3)
        return _digest(run.weights())


def _small(data: str) -> Any:
    from tests.unit.convert.convert_helpers import make_tokenizer, small_config

    folder = Path(data)
    folder.mkdir(parents=True, exist_ok=True)
    return small_config(make_tokenizer(folder))


def _digest(weights: dict[str, torch.Tensor]) -> str:
    content = b"".join(weight.numpy().tobytes() for _, weight in sorted(weights.items()))
    return hashlib.sha256(content).hexdigest()


JOBS: dict[str, Callable[..., Any]] = {
    job.__name__: job
    for job in [
        version,
        imports,
        tried,
        shims,
        announcements,
        fixes,
        own_save,
        train,
        save,
        resume,
    ]
}


def main() -> None:
    """Runs the jobs in their order; other output goes to the error stream."""
    torch.set_num_threads(1)
    before = dict(vars(getattr(torch, GPU)))
    sys.meta_path.append(_ABSENT)
    entry.prepare_imports("cpu")
    platform.install("cpu")
    replaced = [name for name, value in vars(getattr(torch, GPU)).items() if name in before]
    replaced = [name for name in replaced if vars(getattr(torch, GPU))[name] is not before[name]]
    out = os.dup(1)
    os.dup2(2, 1)
    asked = json.loads(sys.argv[1])
    if "shims" in asked:
        asked["shims"] = {"replaced": replaced}
    results = {name: JOBS[name](**arguments) for name, arguments in asked.items()}
    os.write(out, json.dumps(results).encode())


if __name__ == "__main__":
    main()
