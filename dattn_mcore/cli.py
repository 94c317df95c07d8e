"""The console command `dattn`: the name of a sub-command, then that sub-command's own arguments.

Each sub-command is the function that a script or `python -m` calls too, so both do the same. A
further one is a line of `COMMANDS`.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dattn_mcore import __version__
from dattn_mcore.console import complain, say
from dattn_mcore.errors import ConfigError, DattnError, error_lines


class Command(NamedTuple):
    """A sub-command.

    Attributes:
        entry: `module:function`; the function takes the arguments and `prog`, the name that usage
            texts show, and returns the exit status.
        meaning: one line for `dattn --help`.
    """

    entry: str
    meaning: str


COMMANDS = {
    "train": Command("dattn_mcore.training.main:main", "train a model"),
    "data": Command("dattn_mcore.data.__main__:main", "make, index, check and show data sets"),
    "plan": Command("dattn_mcore.plan.__main__:main", "memory and time of a run, before it starts"),
    "convert": Command(
        "tools.checkpoint_convert.__main__:interruptible",
        "weights to and from Hugging Face; compare, inspect and refresh them",
    ),
    "average": Command(
        "tools.checkpoint_convert.__main__:average", "the mean of the weights of checkpoints"
    ),
    "evaluate": Command("dattn_mcore.evaluation.__main__:main", "answer and score benchmarks"),
    "doctor": Command(
        "dattn_mcore.doctor.__main__:main", "what is installed here, what a run takes, and why"
    ),
    "quickstart": Command(
        "dattn_mcore.quickstart.__main__:main",
        "train, convert and evaluate a small model, in a clone of the repository",
    ),
}
_SHOWN = 100  # characters of what was typed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a sub-command; returns its exit status (2 for a user's mistake, 130 after Ctrl-C)."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-h", "--help"):
        sys.stdout.write(help_text())
        return 0
    if name == "--version":
        say(f"dattn {__version__}")
        return 0
    try:
        return _function(name)(rest, prog=f"dattn {name}")
    except DattnError as error:
        sys.stderr.write(error_lines(error))
        return 2
    except KeyboardInterrupt:
        complain("stopped")
        return 130


def help_text() -> str:
    """What `dattn --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.meaning}" for name, command in COMMANDS.items()]
    return "\n".join(
        (
            "usage: dattn COMMAND ...",
            "",
            "Trains vision-language models with decomposed attention on Megatron-Core.",
            "",
            *lines,
            "",
            "dattn COMMAND --help    its arguments",
            "dattn --version         the version",
            "",
            "dattn train starts as many processes as one model needs. For data parallel replicas:",
            "  torchrun --nproc-per-node 8 --no-python dattn train ...",
            "  torchrun --nproc-per-node 8 pretrain_dattn.py ...    the same, in a clone",
            "",
        )
    )


def _function(name: str) -> Callable[..., int]:
    """Imports the function of a sub-command.

    Raises:
        ConfigError: there is no such sub-command, or its module is hidden by another package.
    """
    if name not in COMMANDS:
        raise ConfigError(_unknown(name))
    module, _, function = COMMANDS[name].entry.partition(":")
    try:
        # Imported when it is called: each takes up to some seconds, and help takes none of them.
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name not in ("tools", "tools.checkpoint_convert"):
            raise
        there = getattr(sys.modules.get("tools"), "__file__", None)
        hidden = f"; another package named tools hides it ({there})" if there else ""
        raise ConfigError(
            f"dattn {name} needs tools.checkpoint_convert, which is not found{hidden}; install "
            "dattn-mcore again, in an environment of its own"
        ) from None


def _unknown(name: str) -> str:
    listed = f"the commands are {', '.join(COMMANDS)}"
    if not name:
        return f"dattn needs a command; {listed}"
    near = difflib.get_close_matches(name[:_SHOWN].lstrip("-").lower(), COMMANDS, n=1)
    hint = f"did you mean dattn {near[0]}?" if near else listed
    return f"dattn has no command {name[:_SHOWN]!r}; {hint}"


if __name__ == "__main__":
    sys.exit(main())
