"""YAML files with `base:`, then `section.key=value` from the command line, into a `Config`."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from dattn_mcore.config.hints import (
    first_leaf,
    is_list_of_sections,
    nearest_setting,
    unknown_argument,
)
from dattn_mcore.config.schema import Config
from dattn_mcore.errors import ConfigError


class _StrictLoader(yaml.SafeLoader):
    """Safe loader that refuses duplicate keys and reads `1e-3` as a number."""


def _construct_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            mark = key_node.start_mark
            raise ConfigError(
                f"{mark.name}:{mark.line + 1}: key {key!r} stands twice; remove one of them"
            )
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Reads a configuration.

    Args:
        path: YAML file, or None for the embedded default (the digits task).
        overrides: `section.key=value`, later ones win; values are YAML.

    Raises:
        ConfigError: a file that is missing or malformed, an unknown key, a value of wrong type, or
            epochs on the command line of a run that counts steps.
    """
    tree = read_yaml(Path(path)) if path is not None else {}
    given: dict[str, str] = {}
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator or "." not in name:
            raise ConfigError(unknown_argument(override))
        try:
            value = yaml.load(text, _StrictLoader)  # noqa: S506 (a safe loader)
        except yaml.YAMLError:
            raise ConfigError(f"argument {override!r}: the value is not valid YAML") from None
        given[name] = text
        branch: dict[str, Any] = value
        for part in reversed(name.split(".")):
            branch = {part: branch}
        tree = merge(tree, branch)
    config = from_dict(tree)
    if "train.epochs" in given and config.train.steps is not None:
        raise ConfigError(
            f"train.epochs={given['train.epochs']} has no effect while train.steps="
            f"{config.train.steps} is set; add train.steps=null"
        )
    return config


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Reads one YAML file and what it is based on.

    `base:` names a file or a list of files, relative to this one; later files win, and this one
    wins over all of them.
    """
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base: leads back to the file itself; break the circle")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--config {path} cannot be read ({error.strerror}); name a YAML file in configs/"
        ) from None
    loader = _StrictLoader(text)
    loader.name = str(path)
    try:
        tree = loader.get_single_data() or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise ConfigError(f"{path}{line}: {problem}; mend the YAML") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds no sections; write section: and key: value below it")
    below: dict[str, Any] = {}
    for base in _bases(path, tree.pop("base", None)):
        below = merge(below, read_yaml(path.parent / base, (*seen, path.resolve())))
    return merge(below, tree)


def _bases(path: Path, value: Any) -> list[str]:
    names = value if isinstance(value, list) else [] if value is None else [value]
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(
                f"{path}: base: {name!r} is no file; name YAML files, [a.yaml, b.yaml]"
            )
    return names


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees of settings, the second on top of the first."""
    result = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            value = merge(result[key], value)
        result[key] = value
    return result


def from_dict(tree: Mapping[str, Any]) -> Config:
    """Turns a tree of plain values into a `Config`.

    Raises:
        ConfigError: unknown key (the nearest known one is named), or wrong type.
    """
    return _build(Config, tree, "")


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain values, as written into run folders and checkpoints."""
    return _plain(dataclasses.asdict(config))


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _build(cls: type, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{prefix[:-1]}={tree!r} must be a section with keys of its own")
    types_of = typing.get_type_hints(cls)
    unknown = [key for key in tree if key not in types_of]
    if unknown:
        name = first_leaf(f"{prefix}{unknown[0]}", tree[unknown[0]])
        raise ConfigError(
            f"unknown configuration key {name!r}; did you mean {nearest_setting(name)!r}?"
        )
    values = {}
    for key, value in tree.items():
        kind, name = types_of[key], f"{prefix}{key}"
        if dataclasses.is_dataclass(kind):
            values[key] = _build(typing.cast(type, kind), value, f"{name}.")
        else:
            values[key] = _convert(kind, value, name)
    return cls(**values)


def _convert(kind: Any, value: Any, name: str) -> Any:
    """Checks a plain value against a field's type; integers pass for floats, lists for tuples."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (kind,) = [arg for arg in args if arg is not type(None)]
        return _convert(kind, value, name)
    if origin is tuple:
        items = list(value) if isinstance(value, list | tuple) else [value]
        fixed = Ellipsis not in args
        if fixed and len(items) != len(args):
            raise ConfigError(f"{name}={value!r} must have {len(args)} values, it has {len(items)}")
        if is_list_of_sections(kind):
            section = typing.cast(type, args[0])
            return tuple(_build(section, item, f"{name}[{n}].") for n, item in enumerate(items))
        kinds = args if fixed else (args[0],) * len(items)
        return tuple(_convert(k, item, name) for k, item in zip(kinds, items, strict=True))
    if kind is float and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-3 as text
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    # A bool is an int to Python, but never to a user.
    elif isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    raise ConfigError(f"{name}={value!r} must be of type {kind.__name__}")
