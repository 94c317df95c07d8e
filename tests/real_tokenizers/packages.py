"""Packages whose wheels hold the tokenizers of published models, with their makers' own code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.installed import cache, folder_with

FOLDER_VARIABLE = "DATTN_TOKENIZERS_FOLDER"  # where they are installed: 60 MB, once
CONSTRAINTS = Path(__file__).with_name("constraints.txt")
# The newest of each for all Pythons of this project, and without a web server of its own.
PACKAGES = (
    "mistral-common==1.5.6",  # Mistral's SentencePiece files of versions 1 to 7, and Tekken
    "llama-models==0.3.0",  # Llama 3's
    "dashscope==1.20.14",  # Qwen's
    "tiktoken==0.14.0",
)


def installed() -> Path:
    """The folder with the packages.

    Raises:
        Unavailable: it cannot be installed.
    """
    folder = cache("real-tokenizers", FOLDER_VARIABLE) / str(sys.implementation.cache_tag)
    return folder_with(PACKAGES, folder, CONSTRAINTS)


def ask(name: str, work: Path, conversations: list[dict[str, Any]]) -> dict[str, Any]:
    """What a maker's own code makes of conversations (`oracle.py`), in a process of its own.

    Args:
        name: one of `oracle.ORACLES`.
        work: folder for what it writes.
        conversations: each with `system` and `turns`.

    Returns:
        `tokenizer`: what a run would name as `data.tokenizer`; `ids` of each conversation.

    Raises:
        Unavailable: see `installed`.
    """
    environment = {**os.environ, "PYTHONPATH": str(installed()), "TIKTOKEN_CACHE_DIR": ""}
    environment["HF_HUB_OFFLINE"] = "1"
    oracle = Path(__file__).with_name("oracle.py")
    done = subprocess.run(
        [sys.executable, str(oracle), name, str(work)],
        input=json.dumps(conversations),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
