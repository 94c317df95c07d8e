"""The errors a user can cause. Each message is one line: field or file, value, rule, way out.

Entry points print the message without a traceback and exit with status 2; the trainer tells a
machine's or the network's fault apart, and exits with status 4. Anything else that is raised is a
defect of this project and keeps its traceback.
"""

from dattn_mcore.console import printable


class DattnError(Exception):
    """A mistake the user can fix; its message is one printable line, whatever names it holds.

    Attributes:
        shared: Every rank raises it, and one says it; otherwise it is this rank's alone.
        speaks: Whether this rank says it where it is not shared.
    """

    shared = True
    speaks = True

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(DattnError):
    """Configuration values, or combinations of values, that cannot run.

    Args:
        mistakes: one line for each.
    """

    def __init__(self, *mistakes: str) -> None:
        super().__init__("; also: ".join(mistakes))
        self.mistakes = mistakes


class DataError(DattnError):
    """An annotation, image or tokenizer that is missing or malformed."""


class FaultError(DattnError):
    """A machine or the network failed, no setting: another start may do better."""


class RankError(FaultError):
    """What only this rank can tell: it could not reach the others, so it speaks for itself."""

    shared = False


class LostRankError(FaultError):
    """Another rank ended, and the run with it.

    Args:
        message: names the ranks.
        speaks: whether this rank is the one to say so.
    """

    shared = False

    def __init__(self, message: str, speaks: bool = True) -> None:
        super().__init__(message)
        self.speaks = speaks


class OutOfMemoryError(DattnError):
    """This rank needs more memory than there is; another layout or smaller packs fit."""

    shared = False


class CheckpointError(DattnError):
    """A checkpoint that is missing, damaged, or belongs to another model."""


def error_lines(error: DattnError, kind: str = "error") -> str:
    """What an entry point writes of an error: a line for each mistake.

    Args:
        error: what ended the command.
        kind: the word in front.
    """
    mistakes = error.mistakes if isinstance(error, ConfigError) else (str(error),)
    return "".join(f"{kind}: {printable(mistake)}\n" for mistake in mistakes)


def first_line(error: BaseException) -> str:
    """The first line of what an exception says; its type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# A subclass stands before its base. A rank's own error becomes a fault that all ranks know.
KINDS: tuple[type[DattnError], ...] = (
    ConfigError,
    DataError,
    CheckpointError,
    FaultError,
    DattnError,
)


def kind_of(error: DattnError) -> int:
    """Place in `KINDS` of the first one that an error is; those are made from a message alone.

    An error that goes to another process goes as this number and its message: a subclass may need
    more than a message, and another process may not know it.
    """
    return next(number for number, kind in enumerate(KINDS) if isinstance(error, kind))
