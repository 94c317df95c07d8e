"""Rows to Weights & Biases: offline in the run's folder unless a server is named."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from typing import Any

from dattn_mcore.training.sinks.images import pixels_of
from dattn_mcore.training.sinks.run_facts import RunFacts
from dattn_mcore.training.sinks.sink import Example, Kind, Row

NAME = "wandb"
# Any of these in the environment names a server or an account, or chooses the mode itself.
SERVERS = ("WANDB_BASE_URL", "WANDB_API_KEY", "WANDB_MODE")


class WandbSink:
    """One run of a project; a resumed run goes on in it.

    Args:
        facts: of the run.
        project: its name there.
        server: address of the server; None: that of the environment, else offline.
    """

    def __init__(self, facts: RunFacts, project: str, server: str | None) -> None:
        import wandb

        self._wandb: Any = wandb
        named = server is not None or any(os.environ.get(name) for name in SERVERS)
        run_id = facts.tracker_id(NAME) or uuid.uuid4().hex[:12]
        settings: dict[str, Any] = {"console": "off", "silent": True}
        if server is not None:
            settings["base_url"] = server
        self._run = wandb.init(
            project=project,
            name=facts.name,
            id=run_id,
            resume="allow",
            dir=str(facts.run_dir),
            mode=None if named else "offline",
            config={
                **facts.settings,
                "code_version": facts.code_version,
                "data_fingerprint": facts.data_fingerprint,
            },
            settings=wandb.Settings(**settings),
        )
        facts.keep_tracker_id(NAME, run_id)
        # Its own counter only goes up, and a resumed run does some steps again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Row) -> None:
        """Logs all values of a row at its step."""
        values = {f"{row.kind}/{name}": value for name, value in row.values.items()}
        present = {name: value for name, value in values.items() if value is not None}
        self._run.log({"step": row.step, **present})

    def show(self, kind: Kind, step: int, examples: Sequence[Example]) -> None:
        """Logs a table of images, questions and answers."""
        table = self._wandb.Table(columns=["image", "question", "answer", "right"])
        for example in examples:
            picture = None
            if example.image is not None:
                picture = self._wandb.Image(pixels_of(example.image))
            table.add_data(picture, example.question, example.answer, example.reference)
        self._run.log({"step": step, f"{kind}/answers": table})

    def close(self) -> None:
        """Sends what is left, as far as there is a server."""
        self._run.finish()
