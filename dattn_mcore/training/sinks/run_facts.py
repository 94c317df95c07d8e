"""What is recorded of a run beside its numbers: name, settings, code version, data."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dattn_mcore
from dattn_mcore.config.load import to_dict, to_yaml
from dattn_mcore.config.schema import Config

FILE = "run.json"
_GIT_SECONDS = 10.0


@dataclass(frozen=True)
class RunFacts:
    """Of one start of a run.

    Attributes:
        name: `log.run_name`, or the name of the run's folder.
        run_dir: the run's folder.
        first_step: step the run starts or resumes at.
        settings: the resolved configuration, by section.
        settings_yaml: the same as a YAML file.
        code_version: version of this package, and the commit where it runs from a checkout.
        data_fingerprint: SHA-256 of what order and content of the samples depend on.
    """

    name: str
    run_dir: Path
    first_step: int
    settings: dict[str, Any]
    settings_yaml: str
    code_version: str
    data_fingerprint: str

    def tracker_id(self, tracker: str) -> str | None:
        """The id of this run in a tracker, if an earlier start of it has one."""
        return _read(self.run_dir).get("trackers", {}).get(tracker)

    def keep_tracker_id(self, tracker: str, run_id: str) -> None:
        """Remembers that id, so that a resumed run goes on in the same one."""
        facts = _read(self.run_dir)
        facts.setdefault("trackers", {})[tracker] = run_id
        _write(self.run_dir, facts)


def facts_of(config: Config, *, first_step: int, data_fingerprint: str) -> RunFacts:
    """Collects them, and writes run.json.

    Args:
        config: the run's.
        first_step: step the run starts or resumes at.
        data_fingerprint: of its data set.

    Raises:
        OSError: the run's folder cannot be written.
    """
    run_dir = Path(config.log.run_dir)
    facts = RunFacts(
        name=config.log.run_name or run_dir.resolve().name,
        run_dir=run_dir,
        first_step=first_step,
        settings=to_dict(config),
        settings_yaml=to_yaml(config),
        code_version=code_version(),
        data_fingerprint=data_fingerprint,
    )
    # A run that starts anew in a folder is another run of the tracker.
    kept = _read(run_dir).get("trackers", {}) if first_step else {}
    recorded = {
        "name": facts.name,
        "code_version": facts.code_version,
        "data_fingerprint": data_fingerprint,
        "trackers": kept,
    }
    _write(run_dir, recorded)
    return facts


def code_version() -> str:
    """Version of this package; with the commit, and `-dirty` for edited files, in a checkout."""
    version, folder = dattn_mcore.__version__, Path(dattn_mcore.__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return version
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version}+{found.stdout.strip()}" if found.returncode == 0 else version


def _read(run_dir: Path) -> dict[str, Any]:
    try:
        facts = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _write(run_dir: Path, facts: dict[str, Any]) -> None:
    (run_dir / FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
