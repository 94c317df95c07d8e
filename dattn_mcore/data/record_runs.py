"""From a record to runs of ids: its turns by the template, tools and choice of loss included."""

from __future__ import annotations

from dattn_mcore.config.schema import LossOn
from dattn_mcore.data.sources.record import Sample
from dattn_mcore.data.templates import Run, encode_conversation, encode_document, find_template
from dattn_mcore.data.tokenizer import Tokenizer
from dattn_mcore.data.tool_turns import with_tools
from dattn_mcore.errors import DataError


def texts_of(
    tokenizer: Tokenizer, template: str, sample: Sample, loss_on: LossOn = "all"
) -> tuple[tuple[Run, ...], ...]:
    """Builds the runs of each text of a record: of its branches, or of its only one.

    The arguments and errors are those of `runs_of`; an error names the branch.
    """
    if not sample.branches:
        return (runs_of(tokenizer, template, sample, loss_on),)
    texts = []
    for number, branch in enumerate(sample.branches):
        try:
            texts.append(runs_of(tokenizer, template, branch, loss_on))
        except DataError as error:
            raise DataError(f"branch {number}: {error}") from None
    return tuple(texts)


def runs_of(
    tokenizer: Tokenizer, template: str, sample: Sample, loss_on: LossOn = "all"
) -> tuple[Run, ...]:
    """Builds the runs of a record without branches, whatever it holds.

    Args:
        tokenizer: Gives the ids.
        template: Name of a conversation template.
        sample: The record.
        loss_on: Which of its answers are learned.

    Raises:
        ConfigError: The template is unknown.
        DataError: It cannot hold the record, or none of it would be learned.
    """
    if sample.document:
        return encode_document(tokenizer, sample.turns[0])
    turns, system = sample.turns, sample.system
    if sample.tool_use is not None:
        turns, system = with_tools(find_template(template), sample)
    learned = sample.learned
    if loss_on == "last":
        last = not learned or learned[-1]
        if not last or not turns[-1].strip():
            what = "is empty" if last else "has 'loss' false"
            raise DataError(f"data.loss_on is 'last', and the last answer {what}; nothing to learn")
        learned = (False,) * (len(turns) // 2 - 1) + (True,)
    return encode_conversation(tokenizer, template, turns, system, learned)
