"""`dattn`: which function a sub-command calls, under which name, and what a wrong one gets."""

import importlib
import logging
import re
import signal
import sys
import types
import warnings
from pathlib import Path

import pytest

from dattn_mcore import __version__, cli
from dattn_mcore.cli import COMMANDS, main
from dattn_mcore.training import main as training

ROOT = Path(__file__).resolve().parents[2]
# What the usage of the same function says where it is called as a script or by `python -m`.
TODAY = {
    "train": "pretrain_dattn.py",
    "data": "python -m dattn_mcore.data",
    "plan": "python -m dattn_mcore.plan",
    "convert": "checkpoint_convert",
    "average": "checkpoint_convert average",
    "evaluate": "dattn_mcore.evaluation",
    "doctor": "python -m dattn_mcore.doctor",
    "quickstart": "python -m dattn_mcore.quickstart",
}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def process():
    """Signals, loggers and warnings that a command sets go with its test."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    own, root = logging.getLogger("dattn_mcore"), logging.getLogger()
    kept = (own.handlers[:], own.propagate, own.level, root.handlers[:], root.level)
    with warnings.catch_warnings():
        yield
    own.handlers[:], own.propagate, own.level, root.handlers[:], root.level = kept
    for number, handler in handlers.items():
        signal.signal(number, handler)


def entry(name):
    module, _, function = COMMANDS[name].entry.partition(":")
    return importlib.import_module(module), function


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_gets_its_arguments_and_returns_its_status(name, monkeypatch):
    seen = []

    def command(arguments, prog):
        seen.append((arguments, prog))
        return 7

    monkeypatch.setattr(*entry(name), command)
    assert main([name, "--tp", "2", "optim.lr=1"]) == 7
    assert seen == [(["--tp", "2", "optim.lr=1"], f"dattn {name}")]


@pytest.mark.parametrize("name", COMMANDS)
def test_usage_shows_what_was_typed(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: dattn {name} ")
    assert "python -m" not in said and "checkpoint_convert" not in said
    with pytest.raises(SystemExit):
        getattr(*entry(name))(["--help"])
    said = capsys.readouterr().out
    assert said.startswith(f"usage: {TODAY[name]} ")
    assert "dattn train" not in said


@pytest.mark.parametrize(
    ("arguments", "program"),
    [
        (["data"], "dattn data"),
        (["data", "check", "--bad"], "dattn data"),
        (["plan", "--nodes", "two"], "dattn plan"),
        (["convert", "verify", "one"], "dattn convert verify"),
        (["evaluate", "score", "--benchmark", "none"], "dattn evaluate score"),
        (["quickstart", "--bad"], "dattn quickstart"),
    ],
)
def test_errors_of_arguments_show_what_was_typed(arguments, program, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    *usage, last = capsys.readouterr().err.splitlines()
    assert usage[0].startswith(f"usage: {program} ") and last.startswith(f"{program}: error: ")


def test_help_has_a_line_for_each_command_and_imports_none(monkeypatch, capsys):
    monkeypatch.setattr(importlib, "import_module", None)
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert main(["-h"]) == 0 and capsys.readouterr().out == said
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.meaning)}$", said, re.MULTILINE)
    assert max(map(len, said.splitlines())) <= 100
    assert "torchrun --nproc-per-node 8 --no-python dattn train ..." in said


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dattn {__version__}\n"


LISTED = "the commands are train, data, plan, convert, average, evaluate, doctor, quickstart"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], f"dattn needs a command; {LISTED}"),
        (["trian", "--tp", "2"], "dattn has no command 'trian'; did you mean dattn train?"),
        (["EVAL"], "dattn has no command 'EVAL'; did you mean dattn evaluate?"),
        (["--plan"], "dattn has no command '--plan'; did you mean dattn plan?"),
        (["optim.lr=1"], f"dattn has no command 'optim.lr=1'; {LISTED}"),
        (["a\nerror: b\x1b"], f"dattn has no command 'a\\nerror: b\\x1b'; {LISTED}"),
        (["x" * 200], f"dattn has no command '{'x' * 100}'; {LISTED}"),
    ],
)
def test_a_wrong_command_is_one_line(arguments, said, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"error: {said}\n")


def test_a_mistake_is_the_command_s_own_line(capsys):
    assert main(["data", "check", "data.no=1"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown configuration key 'data.no'")


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted(arguments, prog):
        raise KeyboardInterrupt

    monkeypatch.setattr(*entry("plan"), interrupted)
    assert main(["plan"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_a_converter_that_another_package_hides_is_one_line(monkeypatch, capsys):
    hiding = types.ModuleType("tools")
    hiding.__path__, hiding.__file__ = [], "/elsewhere/tools/__init__.py"
    for name in [name for name in sys.modules if name.startswith("tools.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tools", hiding)
    # An editable installation finds the converter whatever `tools` is.
    finders = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
    monkeypatch.setattr(sys, "meta_path", finders)
    assert main(["convert", "inspect", "x"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "error: dattn convert needs tools.checkpoint_convert, which is not found;"
    )
    assert "(/elsewhere/tools/__init__.py)" in said and said.count("\n") == 1


def test_another_missing_package_keeps_its_traceback(monkeypatch):
    """It is a defect of the installation that no sentence of ours explains."""
    monkeypatch.setitem(COMMANDS, "plan", COMMANDS["plan"]._replace(entry="no_such_package:main"))
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        main(["plan"])


@pytest.fixture
def alone(monkeypatch):
    """A process that no torchrun started."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("call", "program"),
    [(main, ("-m", "dattn_mcore.cli", "train")), (training.main, ())],
    ids=["dattn", "script"],
)
def test_training_restarts_as_it_was_started(call, program, alone, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "restart_under_torchrun", lambda *given: seen.append(given) or 0)
    arguments = ["--tp", "2", "--device", "cpu"]
    assert call(["train", *arguments] if program else arguments) == 0
    assert seen == [(2, "cpu", arguments, program)]


@pytest.mark.parametrize(
    ("call", "program"),
    [(main, "--no-python dattn train"), (training.main, "pretrain_dattn.py")],
    ids=["dattn", "script"],
)
def test_the_way_out_names_what_was_started(call, program, alone, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    arguments = ["--tp", "2", "--device", "cpu"]
    assert call(["train", *arguments] if call is main else arguments) == 2
    said = capsys.readouterr().err
    assert said.endswith(f"got 3; run torchrun --nproc-per-node 2 {program} ...\n")


def test_it_is_installed_as_dattn():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.scripts]\ndattn = "dattn_mcore.cli:main"\n' in project
    assert cli.main is main
