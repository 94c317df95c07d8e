"""All forms of record, the one of a file found from its first records, and one record read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from dattn_mcore.data.sources.metadata import METADATA, is_filled, left_aside
from dattn_mcore.data.sources.record import RecordError, Sample, check_text, kind
from dattn_mcore.data.sources.records.branches import has_branches, read_branches
from dattn_mcore.data.sources.records.cauldron import CAULDRON
from dattn_mcore.data.sources.records.conversation import to_sample
from dattn_mcore.data.sources.records.draft import Form, check_one_way
from dattn_mcore.data.sources.records.energon import ENERGON
from dattn_mcore.data.sources.records.interleaved import INTERLEAVED
from dattn_mcore.data.sources.records.llama_factory import LLAMA_FACTORY
from dattn_mcore.data.sources.records.llava import LLAVA, SHAREGPT
from dattn_mcore.data.sources.records.messages import MESSAGES, SWIFT
from dattn_mcore.data.sources.records.pixmo import PIXMO
from dattn_mcore.errors import DataError

# Of a shard of captions, whose texts are no records; a record in it is one of LLaVA's.
WEBDATASET = replace(LLAVA, name="webdataset", matches=lambda record: False)
FORMS = {
    form.name: form
    for form in (
        LLAVA,
        SHAREGPT,
        MESSAGES,
        SWIFT,
        LLAMA_FACTORY,
        CAULDRON,
        INTERLEAVED,
        PIXMO,
        ENERGON,
        WEBDATASET,
    )
}
TURNS = ("conversations", "messages", "prompt", "completion")  # where branches stand, these do not
LOOKED_AT = 64  # first records from which a form is found
_WAY_OUT = "set format: or mapping: of the source in data.sources (docs/data.md)"
# A file of the second form holds records of the first, which the second reads alike.
_WIDER = {("llava", "sharegpt"), ("messages", "swift"), ("llava", "webdataset")}
# What a source is read by whose form was found, and not given: a record of the second form may
# stand behind those that were looked at. `used` holds the keys of both.
WIDENED = {
    "llava": replace(SHAREGPT, name="llava", image_key=LLAVA.image_key),
    "messages": replace(
        SWIFT,
        name="messages",
        used=SWIFT.used | MESSAGES.used,
        branch_turns=MESSAGES.branch_turns,
    ),
}


def parse_record(
    record: Any,
    key: str,
    known: Collection[str] = METADATA,
    form: Form = LLAVA,
    beside: Sequence[Any] = (),
    folder: str = "",
) -> Sample:
    """Checks one decoded record.

    Args:
        record: From `decode_json`, or a row of a table.
        key: Stands in for an `id` that it lacks.
        known: Names of metadata, from `known_metadata`.
        form: What it is read as.
        beside: Images that lie beside it in a shard or table; its own if it names none.
        folder: Folder of the images; "" where it is not known.

    Raises:
        RecordError: What is wrong with it, without saying where it stands.
    """
    if not isinstance(record, dict):
        raise RecordError(f"a record must be an object, got {kind(record)}", key)
    name: Any = key
    try:
        if is_filled(found := form.id_of(record)):
            name = found
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise DataError(f"'id' must be a string, got {kind(name)}")
        check_text("'id'", str(name))
        read = partial(
            _sample, form=form, known=known, name=str(name), folder=folder, beside=beside
        )
        if has_branches(record, form.branch_turns):
            return read_branches(record, form.branch_turns, TURNS, read)
        return read(record)
    except DataError as error:
        raise RecordError(str(error), name) from None


def _sample(
    record: Mapping[str, Any],
    form: Form,
    known: Collection[str],
    name: str,
    folder: str,
    beside: Sequence[Any],
) -> Sample:
    """Reads a record of one text."""
    ignored = left_aside(record, form.used, known)
    if copies := form.copied(record):
        ignored += copies
        record = {key: value for key, value in record.items() if key not in copies}
    if form.ways:
        check_one_way(record, form.ways)
    if beside and not any(is_filled(record.get(key)) for key in form.image_keys):
        record = {**record, form.image_key: list(beside)}
    draft = form.read(record, known)
    draft.ignored = ignored + draft.ignored
    if "weight" in form.used:
        draft.weight = record.get("weight")
    return to_sample(draft, name, folder)


def matching(record: Any) -> list[str]:
    """Names of the forms that a record looks like."""
    if not isinstance(record, dict):
        return []
    return [form.name for form in FORMS.values() if form.matches(record)]


def detect(records: Sequence[tuple[str, Any]]) -> str | None:
    """The form of a file, from its first records; None where they do not say.

    Args:
        records: What messages call each of them, and the record.

    Raises:
        DataError: Two of them are of different forms, or one could be of several.
    """
    found, first = None, ""
    for place, record in records:
        names = matching(record)
        if len(names) > 1:
            raise DataError(
                f"{place} could be a record of {' and of '.join(names)} (keys "
                f"{_keys(record)}); {_WAY_OUT}"
            )
        if not names or names[0] == found:
            continue
        if found is None or (found, names[0]) in _WIDER:
            found, first = names[0], place
        elif (names[0], found) not in _WIDER:
            raise DataError(
                f"{first} is a record of {found} and {place} one of {names[0]}; make a source of "
                "each form"
            )
    return found


def other_form(record: Any, form: str) -> str | None:
    """The form of a record that could not be read as one of `form`, if it looks like another.

    A form of which one is the wider is no other one: such a record is a bad sample, which says so.
    """
    names = matching(record)
    if form in names or len(names) != 1 or {(names[0], form), (form, names[0])} & _WIDER:
        return None
    return names[0]


def unknown_form(place: str, record: Any) -> DataError:
    """The error for a file whose first records are of no form."""
    if not isinstance(record, Mapping):
        what = f"is {kind(record)}, which is no form that is known"
    elif keys := _keys(record):
        what = f"has the keys {keys}, which is no form that is known"
    else:  # a table's other columns are not read before its form is known
        what = "has no key that a form reads"
    return DataError(f"{place} {what}; {_WAY_OUT}")


def _keys(record: Mapping[str, Any]) -> str:
    names = [f"'{key}'" for key, value in record.items() if is_filled(value)]
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
