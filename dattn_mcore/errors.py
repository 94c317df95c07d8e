"""The errors a user can cause. Each message is one line: field or file, value, rule, way out.

Entry points print the message without a traceback and exit with status 2; the trainer tells a
machine's or the network's fault apart, and exits with status 4. Anything else that is raised is a
defect of this project and keeps its traceback.
"""

from dattn_mcore.console import printable


class DattnError(Exception):
    """A mistake the user can mend; its message is one printable line, whatever names it holds."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(DattnError):
    """A configuration value, or a combination of values, that cannot run."""


class DataError(DattnError):
    """An annotation, image or tokenizer that is missing or malformed."""


class FaultError(DattnError):
    """A machine or the network failed, no setting: another start may do better."""


class RankError(FaultError):
    """What only this rank can tell: it could not reach the others, so it speaks for itself."""


class CheckpointError(DattnError):
    """A checkpoint that is missing, damaged, or belongs to another model."""
