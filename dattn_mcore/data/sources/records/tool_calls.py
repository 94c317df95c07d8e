"""Tools, and calls of them, as one kind of JSON text whatever the form.

A tool is its description, keys in the record's order. A call is `{"name": ..., "arguments": ...}`.
"""

from __future__ import annotations

import json
from typing import Any

from dattn_mcore.data.sources.metadata import is_filled
from dattn_mcore.data.sources.record import check_text, decode_json, kind
from dattn_mcore.errors import DataError

_ABOUT_A_CALL = ("id", "type", "index")  # OpenAI's, which no template writes


def tools_of(value: Any) -> tuple[str, ...]:
    """The tools of a record: a list of objects, or its JSON as a string.

    Raises:
        DataError: It is neither.
    """
    if not is_filled(value):
        return ()
    if isinstance(value, str):
        value = _decoded(value, "'tools'")
    if not isinstance(value, list):
        raise DataError(f"'tools' must be a list of objects, got {kind(value)}")
    for number, tool in enumerate(value):
        if isinstance(tool, str):  # TRL's data sets hold a list of JSON texts
            value[number] = _decoded(tool, f"'tools'[{number}]")
        if not isinstance(value[number], dict):
            raise DataError(f"'tools'[{number}] must be an object, got {kind(value[number])}")
    return tuple(_written(tool) for tool in value)


def calls_of_text(text: str, where: str) -> tuple[str, ...]:
    """Calls that a turn holds as JSON: an object, or a list of objects.

    Args:
        text: The JSON.
        where: How messages call the turn.

    Raises:
        DataError: It is no JSON, or holds no call or one that is none.
    """
    found = _decoded(text, where)
    calls = found if isinstance(found, list) else [found]
    if not calls:
        raise DataError(f"{where} calls no tool; it is an empty list")
    return tuple(call_of(call, where) for call in calls)


def call_of(value: Any, where: str) -> str:
    """One call: `{name, arguments}`, or OpenAI's `{type: function, function: {...}}`.

    Raises:
        DataError: It has no name, its arguments are no object, or it holds something else.
    """
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        _check_keys(value, ("function", *_ABOUT_A_CALL), where)
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise DataError(f"{where}: the call of a tool must be an object with a 'name'")
    _check_keys(value, ("name", "arguments", *_ABOUT_A_CALL), where)
    arguments = value.get("arguments")
    if isinstance(arguments, str):
        arguments = _decoded(arguments or "{}", f"{where}: 'arguments'")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise DataError(f"{where}: 'arguments' must be an object, got {kind(arguments)}")
    return _written({"name": value["name"], "arguments": arguments})


def _check_keys(call: dict[str, Any], used: tuple[str, ...], where: str) -> None:
    for key, value in call.items():
        if key not in used and is_filled(value):
            raise DataError(f"{where}: the call of a tool holds '{key}', which is not read")


def _decoded(text: str, where: str) -> Any:
    check_text(where, text)
    try:
        return decode_json(text.encode())
    except DataError as error:
        raise DataError(f"{where} holds {error}") from None


def _written(value: Any) -> str:
    """As the chat templates of transformers write JSON."""
    text = json.dumps(value, ensure_ascii=False)
    check_text("a tool", text)
    return text
