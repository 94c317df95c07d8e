"""What must hold before the first step; each failure is one line that names rank and host.

In order: every rank starts, sees its device, and has the same code and configuration (through the
store that torchrun provides, before any collective); an all-reduce over all ranks is right; the
checkpoint folder can be written by every rank and is the same folder for all.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform as python_platform
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import dattn_mcore
from dattn_mcore.config.load import to_dict
from dattn_mcore.config.schema import Config
from dattn_mcore.errors import (
    CheckpointError,
    ConfigError,
    DattnError,
    FaultError,
    RankError,
    first_line,
)
from dattn_mcore.training.agreement import agree

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "triton")
SHARED_FOLDER_SECONDS = 10.0  # network file systems show a new file late
_DEVICE = "the kind of device"
_READING_SECONDS = 20.0  # a rank that takes longer to read why the run ends has ended itself


@functools.cache
def code_digest() -> str:
    """SHA-256 over the package's source files."""
    root = Path(dattn_mcore.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def describe_rank(config: Config, device_kind: str) -> dict[str, Any]:
    """What must be the same on every rank, by the name a message gives it."""
    facts: dict[str, Any] = dict(_flatten(to_dict(config)))
    facts[_DEVICE] = device_kind
    facts["Python"] = python_platform.python_version()
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[f"the version of {name}"] = importlib.metadata.version(name)
    facts["the code of dattn_mcore (digest)"] = code_digest()[:12]
    return json.loads(json.dumps(facts))


def check_ranks(
    store: Any,
    rank: int,
    world_size: int,
    facts: dict[str, Any],
    problem: DattnError | None,
    timeout_seconds: float,
) -> None:
    """Compares all ranks through the store; needs no device and no process group.

    Args:
        store: torch.distributed's store.
        rank: of this process.
        world_size: number of ranks.
        facts: from `describe_rank`.
        problem: what is wrong with this rank's device; None where nothing is.
        timeout_seconds: how long a rank may take to arrive here.

    Raises:
        ConfigError: the same on every rank; names the rank and host that differ.
        FaultError: likewise, where a rank does not come or a machine's device fails.
    """
    mine = {
        "host": socket.gethostname(),
        "problem": None if problem is None else str(problem),
        "fault": isinstance(problem, FaultError),
        "facts": facts,
    }
    store.set(f"start/{rank}", json.dumps(mine))
    if rank == 0:
        found = _missing(store, world_size, timeout_seconds) or _compare(store, world_size)
        kind = type(found).__name__ if found else ""
        store.set("start/verdict", json.dumps([kind, str(found)]))
    store.wait(["start/verdict"], datetime.timedelta(seconds=2 * timeout_seconds))
    kind, message = json.loads(store.get("start/verdict"))
    if not kind:
        return
    store.add("start/readers", 1)
    if rank == 0:
        _wait_for_readers(store, world_size)
    raise FaultError(message) if kind == FaultError.__name__ else ConfigError(message)


def _wait_for_readers(store: Any, world_size: int) -> None:
    """The store ends with rank 0, and ranks that are here must have read the verdict by then."""
    arrived = sum(store.check([f"start/{rank}"]) for rank in range(world_size))
    until = time.monotonic() + _READING_SECONDS
    while store.add("start/readers", 0) < arrived and time.monotonic() < until:
        time.sleep(0.05)


def _missing(store: Any, world_size: int, timeout_seconds: float) -> DattnError | None:
    names = [f"start/{rank}" for rank in range(world_size)]
    try:
        store.wait(names, datetime.timedelta(seconds=timeout_seconds))
    except RuntimeError:  # DistStoreError: a key did not come in time
        late = [str(rank) for rank, name in enumerate(names) if not store.check([name])]
        if late:
            more = f" and {len(late) - 8} more" if len(late) > 8 else ""
            return FaultError(
                f"rank {', '.join(late[:8])}{more} of {world_size} did not start within "
                f"health.start_timeout_seconds={timeout_seconds:g}; look at the logs of those "
                "ranks, or raise it"
            )
    return None


def _compare(store: Any, world_size: int) -> DattnError | None:
    reports = [json.loads(store.get(f"start/{rank}")) for rank in range(world_size)]
    hosts = {report["host"] for report in reports}
    troubled = {report["host"] for report in reports if report["problem"]}
    for rank, report in enumerate(reports):
        if report["problem"]:
            # A mistake of the start shows on every host; on some only, it is those that are ill.
            fault = report["fault"] or troubled != hosts
            message = f"rank {rank} on {report['host']}: {report['problem']}"
            return FaultError(message) if fault else ConfigError(message)
    first = reports[0]
    for rank, report in enumerate(reports):
        ours, theirs = first["facts"], report["facts"]
        for name in sorted({*ours, *theirs}):
            if ours.get(name) != theirs.get(name):
                # Without a GPU where others have one: its driver may have lost it.
                kind = FaultError if name == _DEVICE else ConfigError
                return kind(
                    f"rank {rank} on {report['host']}: {name} is {theirs.get(name)!r}, and rank 0 "
                    f"on {first['host']} has {ours.get(name)!r}; give all nodes the same files, "
                    "environment and command"
                )
    return None


def check_all_reduce(device: torch.device) -> None:
    """One all-reduce over all ranks, whose result is known.

    Raises:
        RankError: a wrong sum, or the library's own failure, with rank and host.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    where = f"rank {rank} on {socket.gethostname()}"
    advice = "run the vendor's collective tests on these nodes"
    try:
        value = torch.full((1024,), float(rank + 1), device=device)
        dist.all_reduce(value)
        found = value.tolist()
    except RuntimeError as error:
        reason = first_line(error)
        raise RankError(
            f"{where}: an all-reduce over {world_size} ranks fails ({reason}); {advice}"
        ) from None
    expected = world_size * (world_size + 1) / 2
    if any(item != expected for item in found):
        raise RankError(
            f"{where}: an all-reduce over {world_size} ranks gives {found[0]:g} instead of "
            f"{expected:g}; {advice}"
        )


def check_checkpoint_folder(run_dir: Path, device: torch.device) -> None:
    """Every rank writes into the checkpoint folder, and sees what rank 0 wrote.

    Raises:
        CheckpointError: on every rank; names the rank and host that cannot.
    """
    folder = run_dir / "checkpoints"
    rank = dist.get_rank()
    token: list[Any] = [uuid.uuid4().hex]
    dist.broadcast_object_list(token, src=0)
    mine = folder / f".start_{token[0]}_{rank}"
    problem = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mine.write_bytes(b"0" * 4096)
    except OSError as error:
        problem = CheckpointError(
            f"log.run_dir={run_dir}: checkpoints cannot be written there ({error.strerror}); "
            "choose another folder, or fix its permissions or free space"
        )
    try:
        agree(problem, device)
        if not _appears(folder / f".start_{token[0]}_0"):
            problem = CheckpointError(
                f"log.run_dir={run_dir} is not the folder that rank 0 sees; put it on a file "
                "system that all nodes share"
            )
        agree(problem, device)
    finally:
        with contextlib.suppress(OSError):
            mine.unlink()


def _appears(path: Path) -> bool:
    """Whether a file is there, or comes within the time that network file systems need."""
    end = time.monotonic() + SHARED_FOLDER_SECONDS
    while True:
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # makes a network file system look again
        if path.exists():
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
