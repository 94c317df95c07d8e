"""Tools, calls and responses of a conversation as the texts of its turns, by a template's rule."""

from __future__ import annotations

from dattn_mcore.architectures import chat_templates
from dattn_mcore.architectures.chat import ChatTemplate
from dattn_mcore.data.sources.record import Sample
from dattn_mcore.errors import DataError


def with_tools(chat: ChatTemplate, sample: Sample) -> tuple[tuple[str, ...], str]:
    """The turns and the system text of a sample with tools.

    Args:
        chat: The template.
        sample: Has `tool_use`.

    Raises:
        DataError: The template writes no tools; names those that do.
    """
    used, rule = sample.tool_use, chat.tools
    assert used is not None
    if rule is None:
        able = ", ".join(name for name, one in chat_templates().items() if one.tools)
        raise DataError(
            f"the record uses tools, and data.template '{chat.name}' has no place for them; use a "
            f"template that has ({able}), or write tools, calls and responses into the texts of "
            "user and assistant turns as the model's own template does"
        )
    turns = list(sample.turns)
    for number, calls in enumerate(used.calls):
        lines = [f"{rule.call[0]}{call}{rule.call[1]}" for call in calls]
        said = turns[2 * number + 1].strip()
        turns[2 * number + 1] = "\n".join(([said] if said else []) + lines)
    for number, responses in enumerate(used.responses):
        if responses:
            lines = [f"{rule.response[0]}{one}{rule.response[1]}" for one in responses]
            turns[2 * number] = "\n".join(lines)
    system = sample.system.strip() or chat.default_system or ""
    if used.tools:
        block = "\n".join([rule.before, *used.tools, rule.after])
        system = f"{system}\n\n{block}" if system else block
    return tuple(turns), system
