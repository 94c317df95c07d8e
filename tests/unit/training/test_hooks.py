"""The list of hooks: order, errors of one rank and of all, what is remembered."""

import errno
import logging
from pathlib import Path

import pytest

from dattn_mcore.config.load import from_dict
from dattn_mcore.errors import CheckpointError, DataError
from dattn_mcore.training.agreement import Agreement
from dattn_mcore.training.hooks import Hook, Hooks, StepDone
from dattn_mcore.training.step import StepResult


class Noted(Hook):
    """Writes down each call."""

    def __init__(self, calls, name, everywhere=False, error=None, early=None):
        self.calls, self.name, self.everywhere = calls, name, everywhere
        self.error, self.early = error, early  # after a step or at the end; before a step

    def before_step(self, step):
        self.calls.append((self.name, "before", step))
        if self.early is not None:
            raise self.early

    def after_step(self, done):
        self.calls.append((self.name, "after", done.step))
        if isinstance(self.error, DataError) and not self.everywhere:
            return self.error
        if self.error is not None:
            raise self.error
        return None

    def saved(self, folder):
        self.calls.append((self.name, "saved", folder.name))

    def metrics(self, step):
        return {f"{self.name}/loss": 1.0}

    def close(self, step, complete):
        self.calls.append((self.name, "close", complete))
        if self.error is not None:
            raise self.error


class Remembering(Hook):
    """Has a state."""

    value = 0

    def state(self):
        return {"value": self.value}

    def restore(self, state):
        self.value = state["value"]


@pytest.fixture
def done():
    agreed = Agreement(stop=False, failures=(), data_wait=0.0, peak_memory=0)
    result = StepResult(1.0, 1.0, 1, 0.0, {})
    return StepDone(step=3, last_step=9, result=result, batch=None, agreed=agreed)


def hooks_of(tmp_path, *hooks):
    return Hooks(hooks, from_dict({"log": {"run_dir": str(tmp_path)}}))


def test_all_are_called_in_order(tmp_path, done):
    calls = []
    hooks = hooks_of(tmp_path, Noted(calls, "a"), Noted(calls, "b", everywhere=True))
    hooks.before_step(3)
    assert hooks.after_step(done) is None
    hooks.saved(None)  # nothing has become whole
    hooks.saved(Path("checkpoints/step_00000003"))
    hooks.close(3, complete=False)
    kinds = (("before", 3), ("after", 3), ("saved", "step_00000003"), ("close", False))
    assert calls == [(name, *kind) for kind in kinds for name in ("a", "b")]
    assert hooks.metrics(3) == {"a/loss": 1.0, "b/loss": 1.0}


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (DataError("too many bad samples"), DataError, "too many bad samples"),
        (
            OSError(errno.ENOSPC, "No space left"),
            CheckpointError,
            "reports cannot be written there",
        ),
        (ValueError("a defect"), DataError, "reporting step 3 failed (ValueError: a defect)"),
    ],
    ids=["mistake", "full-disk", "defect"],
)
def test_an_error_of_this_rank_alone_waits_for_the_next_exchange(
    tmp_path, done, monkeypatch, error, kind, message
):
    """What all ranks do together afterwards is done, else they would wait for this one."""
    monkeypatch.setattr("dattn_mcore.training.last_words.dist.get_rank", lambda: 0)
    calls = []
    second = DataError("a second one")
    hooks = hooks_of(
        tmp_path,
        Noted(calls, "alone", error=error),
        Noted(calls, "later", error=second),
        Noted(calls, "together", everywhere=True),
    )
    problem = hooks.after_step(done)
    assert type(problem) is kind and message in str(problem)
    assert [name for name, *_ in calls] == ["alone", "later", "together"]


def test_an_error_of_all_ranks_ends_the_run_at_once(tmp_path, done):
    hooks = hooks_of(tmp_path, Noted([], "together", everywhere=True, error=DataError("all")))
    with pytest.raises(DataError, match="all"):
        hooks.after_step(done)


def test_a_disk_that_is_full_at_the_end(tmp_path):
    hooks = hooks_of(tmp_path, Noted([], "a", error=OSError(errno.ENOSPC, "No space left")))
    problem = hooks.close(9, complete=True)
    assert isinstance(problem, CheckpointError)
    assert "reports cannot be written there (No space left)" in str(problem)


def test_ranks_that_wait_at_the_end_are_not_left_alone(tmp_path):
    calls = []
    problem = hooks_of(
        tmp_path,
        Noted(calls, "first", everywhere=True, error=DataError("scores cannot be written")),
        Noted(calls, "alone"),
        Noted(calls, "together", everywhere=True),
    ).close(9, complete=True)
    assert str(problem) == "scores cannot be written"
    assert [name for name, *_ in calls] == ["first", "together"]


def test_an_error_before_a_step_is_told_after_it(tmp_path, done):
    """The step itself is done: the other ranks are in it already."""
    calls = []
    full = OSError(errno.ENOSPC, "No space left")
    hooks = hooks_of(
        tmp_path, Noted(calls, "alone", early=full), Noted(calls, "all", everywhere=True)
    )
    hooks.before_step(3)
    assert calls == [("alone", "before", 3), ("all", "before", 3)]
    problem = hooks.after_step(done)
    assert isinstance(problem, CheckpointError) and "No space left" in str(problem)


def test_a_state_goes_through_a_checkpoint(tmp_path, caplog):
    first, second = Remembering(), Remembering()
    first.value = 7
    states = hooks_of(tmp_path, first, Noted([], "without")).state()
    assert states == {"Remembering": {"value": 7}}
    hooks_of(tmp_path, second).restore({**states, "GoneSince": {"value": 1}})
    assert second.value == 7
    with caplog.at_level(logging.INFO):
        hooks_of(tmp_path).saved(tmp_path / "step_00000001")
    assert "saved" in caplog.text
