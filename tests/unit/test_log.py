"""The package's messages on standard output: once, wherever it is by now."""

import io
import logging
import sys

import pytest

from dattn_mcore.log import log_to_stdout

logger = logging.getLogger("dattn_mcore")


@pytest.fixture(autouse=True)
def _as_before():
    before = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def test_a_message_is_said_once_on_the_newest_output(monkeypatch):
    outputs = [io.StringIO(), io.StringIO()]
    for output in outputs:
        monkeypatch.setattr(sys, "stdout", output)
        log_to_stdout()
    logging.getLogger("dattn_mcore.data").info("%d samples", 3)
    assert [output.getvalue() for output in outputs] == ["", "3 samples\n"]


def test_another_handler_stays_and_hinders_nothing(monkeypatch):
    other, output = io.StringIO(), io.StringIO()
    logger.addHandler(logging.StreamHandler(other))
    monkeypatch.setattr(sys, "stdout", output)
    log_to_stdout()
    logger.info("said")
    assert (other.getvalue(), output.getvalue()) == ("said\n", "said\n")


def test_a_rank_that_does_not_speak(monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    log_to_stdout(logging.ERROR)
    logger.info("not said")
    logger.error("said")
    assert output.getvalue() == "said\n"
