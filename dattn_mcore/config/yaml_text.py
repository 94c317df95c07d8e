"""YAML as users write it: strict about keys, and one line for whatever is wrong with it."""

from __future__ import annotations

from typing import Any

import yaml

from dattn_mcore.errors import ConfigError

_MERGE = "tag:yaml.org,2002:merge"  # of the key `<<`
_TEXT = "tag:yaml.org,2002:str"
_SHOWN = 60  # characters of a text in a message


class _StrictLoader(yaml.SafeLoader):
    """Safe loader that refuses keys that stand twice or are no names; `<<` merges mappings.

    Args:
        text: YAML.
        place: of the text: a file's path, whose lines are named, or an argument.
        is_file: which of the two.
    """

    def __init__(self, text: str, place: str, is_file: bool) -> None:
        super().__init__(text)
        self.place, self.is_file = place, is_file

    def where(self, mark: yaml.Mark | None) -> str:
        """The place of a mark, for a message."""
        return f"{self.place}:{mark.line + 1}" if self.is_file and mark else self.place


def _construct_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    own: dict[str, Any] = {}
    seen: set[str] = set()
    for key_node, value_node in node.value:
        where = loader.where(key_node.start_mark)
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if key is None or key_node.tag not in (_TEXT, _MERGE):
            named = "a list or a mapping" if key is None else repr(key[:_SHOWN])
            raise ConfigError(f"{where}: {named} as a key is no name of a setting; write a name")
        if key in seen:
            raise ConfigError(f"{where}: key {key[:_SHOWN]!r} stands twice; remove one of them")
        seen.add(key)
        try:
            value = loader.construct_object(value_node, deep=True)
        except (ConfigError, yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # constructors of numbers, dates and so on raise what they like
            raise ConfigError(
                f"{where}: the value of {key[:_SHOWN]!r} cannot be read as "
                f"{value_node.tag.rpartition(':')[2]}; correct it, or quote it if it is text"
            ) from error
        if key_node.tag == _MERGE:
            merged = {**_mappings(value, where), **merged}
        else:
            own[key] = value
    return {**merged, **own}


def _mappings(value: Any, where: str) -> dict[str, Any]:
    """What `<<` brings in: a mapping, or a list of them, of which the earlier win."""
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, dict) for part in parts):
        raise ConfigError(f"{where}: << takes a mapping or a list of mappings; write <<: *name")
    return {key: item for part in reversed(parts) for key, item in part.items()}


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def parse_yaml(text: str, place: str, is_file: bool) -> Any:
    """The value of a YAML text; None where it is empty.

    Args:
        text: YAML.
        place: of the text, for messages: a file's path or an argument.
        is_file: which of the two.

    Raises:
        ConfigError: one line that says where and what.
    """
    try:
        return _StrictLoader(text, place, is_file).get_single_data()
    except ConfigError:
        raise
    except yaml.reader.ReaderError as error:
        line = f":{text.count(chr(10), 0, error.position) + 1}" if is_file else ""
        raise ConfigError(
            f"{place}{line}: character {error.character:#x} cannot stand in YAML; remove it"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if is_file and mark else ""
        problem = " ".join((getattr(error, "problem", None) or "no reason given").split())
        raise ConfigError(
            f"{place}{line}: not valid YAML ({problem[:200]}); correct the YAML"
        ) from None
    except RecursionError:
        raise ConfigError(
            f"{place}: is nested too deeply for settings, which have few levels; flatten it"
        ) from None
    except Exception as error:  # as above, of a value that stands alone
        raise ConfigError(
            f"{place}: a value cannot be read ({type(error).__name__}); correct or quote it if it "
            "is text"
        ) from error
