"""Rows to MLflow: a file store in the run's folder unless a server is named."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dattn_mcore.training.sinks.images import pixels_of
from dattn_mcore.training.sinks.run_facts import RunFacts
from dattn_mcore.training.sinks.sink import Example, Kind, Row

NAME = "mlflow"
SERVER = "MLFLOW_TRACKING_URI"
_MOST_PARAMETERS = 100  # that the server takes in one call
_LONGEST_VALUE = 500  # characters of a parameter, which older servers allow


class MlflowSink:
    """One run of an experiment; a resumed run goes on in it.

    Args:
        facts: of the run.
        project: name of the experiment.
        server: tracking URI; None: that of the environment, else a folder of the run.
    """

    def __init__(self, facts: RunFacts, project: str, server: str | None) -> None:
        uri = server or os.environ.get(SERVER)
        if uri is None:
            uri = (facts.run_dir.resolve() / "mlruns").as_uri()
            # Without it newer releases refuse a plain folder, which needs no database.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        self._client: Any = MlflowClient(tracking_uri=uri)
        run_id = facts.tracker_id(NAME)
        if run_id is None:
            found = self._client.get_experiment_by_name(project)
            experiment = found.experiment_id if found else self._client.create_experiment(project)
            run_id = self._client.create_run(experiment, run_name=facts.name).info.run_id
            facts.keep_tracker_id(NAME, run_id)
            self._describe(run_id, facts)
        else:
            self._client.update_run(run_id, status="RUNNING")
        self._id: str = run_id

    def write(self, row: Row) -> None:
        """Logs all values of a row at its step."""
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        present = {name: value for name, value in row.values.items() if value is not None}
        metrics = [
            Metric(f"{row.kind}/{_allowed(name)}", float(value), now, row.step)
            for name, value in present.items()
        ]
        self._client.log_batch(self._id, metrics=metrics)

    def show(self, kind: Kind, step: int, examples: Sequence[Example]) -> None:
        """Logs the images, and questions and answers as JSON."""
        folder = f"{kind}/step_{step:08d}"
        rows = [
            {"question": e.question, "answer": e.answer, "right": e.reference} for e in examples
        ]
        self._client.log_dict(self._id, {"examples": rows}, f"{folder}/answers.json")
        for number, example in enumerate(examples):
            if example.image is not None:
                self._client.log_image(self._id, pixels_of(example.image), f"{folder}/{number}.png")

    def close(self) -> None:
        """Marks the run as finished."""
        self._client.set_terminated(self._id)

    def _describe(self, run_id: str, facts: RunFacts) -> None:
        from mlflow.entities import Param

        named = dict(_flat(facts.settings))
        named["code_version"] = facts.code_version
        named["data_fingerprint"] = facts.data_fingerprint
        parameters = [Param(name, value[:_LONGEST_VALUE]) for name, value in named.items()]
        for start in range(0, len(parameters), _MOST_PARAMETERS):
            self._client.log_batch(run_id, params=parameters[start : start + _MOST_PARAMETERS])
        self._client.log_text(run_id, facts.settings_yaml, "config.yaml")


def _allowed(name: str) -> str:
    """A metric's name as MLflow's file store takes it.

    It makes folders of slashes, so that `loss` and `loss/vqa` exclude each other; and refuses what
    the path of a source may hold, such as `*`.
    """
    return re.sub(r"\.+", ".", re.sub(r"[^\w\-. :]", "_", name.replace("/", ".")))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """`section.key` and value of every setting."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)
