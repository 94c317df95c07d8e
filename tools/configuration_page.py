"""Writes docs/configuration.md from the dataclasses: `python -m tools.configuration_page`."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import typing
from pathlib import Path

from dattn_mcore.config.hints import is_list_of_sections
from dattn_mcore.config.schema import Config
from dattn_mcore.config.words import words_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
_INTRODUCTION = """# Configuration

Settings come from the defaults below, then `--config FILE` (a file may name another, or a list of
others, as `base:`; later ones win), then `section.key=value` on the command line, then the short
flags `--tp --pp --cp --device`.
YAML's merge keys (`<<: *name`) work. All mistakes are reported at once, one on a line; an unknown
key is reported with the nearest known one. `--dry-run` prints the result, the layout and the sizes,
and stops. The resolved settings are written to `config.yaml` in the run's folder and into every
checkpoint.

This page is generated from `dattn_mcore/config/schema.py` and
`dattn_mcore/architectures/sizes.py` by `python -m tools.configuration_page`.
"""
_FIELD = re.compile(r"^    (\w+): [^#]*(?:#\s*(.*))?$")


def render() -> str:
    """The whole page."""
    return _INTRODUCTION + "".join(_section(Config, ""))


def _section(cls: type, prefix: str) -> list[str]:
    comments = _comments(cls)
    kinds = typing.get_type_hints(cls)
    rows, below = [], []
    for field in dataclasses.fields(cls):
        name, kind = f"{prefix}{field.name}", kinds[field.name]
        if dataclasses.is_dataclass(kind):
            below += _section(typing.cast(type, kind), f"{name}.")
            continue
        if is_list_of_sections(kind):
            below += _section(typing.get_args(kind)[0], f"{name}[].")
        meaning = comments.get(field.name, "")
        if words := words_of(name, kind):
            meaning = f"{', '.join(f'`{word}`' for word in words)}; {meaning}".strip("; ")
        rows.append(f"| `{name}` | `{_value(field.default)}` | {meaning} |\n")
    if not rows:
        return below
    title = f"\n## {prefix[:-1]}\n\n{(cls.__doc__ or '').splitlines()[0]}\n\n"
    return [title, "| setting | default | meaning |\n|---|---|---|\n", *rows, *below]


def _comments(cls: type) -> dict[str, str]:
    lines = inspect.getsource(cls).splitlines()
    found = (_FIELD.match(line) for line in lines)
    return {match[1]: match[2] or "" for match in found if match}


def _value(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(_value, value))}]" if isinstance(value, tuple) else str(value)


def main() -> int:
    """Writes the page."""
    PAGE.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
