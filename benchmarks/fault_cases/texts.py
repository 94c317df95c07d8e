"""Annotation files, configurations and model folders that are damaged or made to do harm."""

from __future__ import annotations

import contextlib
import functools
import io
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml

from benchmarks.fault_cases.case import Case, Workshop, one_line_of
from benchmarks.fault_cases.images import mutated

MUTATIONS = 25
# Configurations that once were, or might be, more than one line of error.
YAML = {
    "NUL": b"optim: {lr: 1e-3}\0",
    "Latin-1": b"log: {run_dir: caf\xe9}\n",
    "20,000 brackets": b"data: " + b"[" * 20_000,
    "a number of 5,000 digits": b"optim: {lr: " + b"7" * 5000 + b"}\n",
    "a list as key": b"? [a, b]\n: 1\n",
    "a mapping as key": b"? {a: b}\n: 1\n",
    "an infinite rate": b"optim: {lr: .inf}\n",
    "a rate that is no number": b"optim: {lr: .nan}\n",
    "a beta above one": b"optim: {beta2: 1.5}\n",
    "a tag that makes objects": b"optim: !!python/object/apply:os.system ['true']\n",
    "an alias of itself": b"data: &a [*a]\n",
    "a billion laughs": b"a: &a [x, x]\n"
    + b"".join(
        b"%c: &%c [*%c, *%c, *%c, *%c]\n" % (n, n, *[n - 1] * 4) for n in range(ord("b"), ord("l"))
    ),
    "a key twice": b"optim: {lr: 1e-3, lr: 2e-3}\n",
    "a section that is a number": b"optim: 3\n",
    "a file that is a list": b"- a\n- b\n",
    "an empty file": b"",
}
# Files of an export, and what is done to each.
EXPORT_FILES = ("config.json", "model.safetensors", "tokenizer.json", "processor_config.json")


def cases(generator: random.Random) -> list[Case]:
    """Known ones, and random damage."""
    found = [
        Case(kind="configuration", name=name, run=functools.partial(_configuration, name=name))
        for name in YAML
    ]
    for _ in range(MUTATIONS):
        seed = generator.randrange(10**6)
        run = functools.partial(_annotations, seed=seed)
        found.append(Case(kind="annotations", name=f"damage {seed}", run=run))
    for file in EXPORT_FILES:
        for _ in range(3):
            seed = generator.randrange(10**6)
            run = functools.partial(_export, file=file, seed=seed)
            found.append(Case(kind="export", name=f"{file}, damage {seed}", run=run))
    return found


def _configuration(folder: Path, workshop: Workshop, name: str) -> str | None:
    """`--dry-run` says one line and ends with 2; an empty file is the default."""
    from dattn_mcore.training.main import main

    (folder / "run.yaml").write_bytes(YAML[name])
    status, said = _said(lambda: main(["--config", str(folder / "run.yaml"), "--dry-run"]))
    if name == "an empty file":
        return None if status in (0, 2) and "Traceback" not in said else said[-200:]
    return f"status {status}" if status != 2 else one_line_of(said, several=True)


def _annotations(folder: Path, workshop: Workshop, seed: int) -> str | None:
    """`check` names what is wrong, and comes to an end."""
    from dattn_mcore.data.__main__ import main

    raw = (workshop.digits / "instruct.json").read_bytes()
    (folder / "all.json").write_bytes(mutated(raw, random.Random(seed)))
    tree = workshop.tree(folder / "run")
    tree["data"] |= {"annotations": str(folder / "all.json"), "index_dir": str(folder / "index")}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    command = ["check", "--config", str(folder / "run.yaml"), "--workers", "1", "--decode"]
    status, said = _said(lambda: main(command))
    if status not in (0, 1, 2):
        return f"status {status}"
    return f"a traceback: {said[-200:]}" if "Traceback" in said else None


def _export(folder: Path, workshop: Workshop, file: str, seed: int) -> str | None:
    """A model folder that is damaged loads as it was, or is refused in one line."""
    from tools.checkpoint_convert.__main__ import main

    whole = workshop.folder / "export"
    if not whole.exists():
        status, said = _said(lambda: main(["mcore-to-hf", str(workshop.whole), str(whole)]))
        assert status == 0, said
    shutil.copytree(whole, folder / "export")
    target = folder / "export" / file
    raw = target.read_bytes()
    generator = random.Random(seed)
    if file.endswith(".safetensors"):  # its header: a weight's bits have no check of their own
        size = 8 + int.from_bytes(raw[:8], "little")
        target.write_bytes(mutated(raw[:size], generator) + raw[size:])
    else:
        target.write_bytes(mutated(raw, generator))
    command = ["inspect", str(folder / "export")]
    status, said = _said(lambda: main(command))
    if status == 0:
        return None
    return f"status {status}" if status != 2 else one_line_of(said)


def _said(command: Callable[[], int]) -> tuple[int, str]:
    """Exit status of a command in this process, and what it said."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = command()
    return status, out.getvalue()
