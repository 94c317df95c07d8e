"""YAML files with `base:`, then `section.key=value` from the command line, into a `Config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from dattn_mcore.config.convert import build, shown
from dattn_mcore.config.former import translated
from dattn_mcore.config.hints import unknown_argument
from dattn_mcore.config.schema import Config
from dattn_mcore.config.yaml_text import parse_yaml
from dattn_mcore.errors import ConfigError

_DEEPEST = 8  # dots in the name of a setting


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
        if not separator or not 1 <= name.count(".") <= _DEEPEST:
            raise ConfigError(unknown_argument(override))
        value = parse_yaml(text, f"argument {shown(override)}", is_file=False)
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
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: is not UTF-8 (byte {error.object[error.start]:#x} at {error.start}); save it "
            "as UTF-8"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"--config {path} cannot be read ({error.strerror}); name a YAML file in configs/"
        ) from None
    tree = parse_yaml(text, str(path), is_file=True) or {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds no sections; write section: and key: value below it")
    below: dict[str, Any] = {}
    for base in _bases(path, tree.pop("base", None)):
        below = merge(below, read_yaml(path.parent / base, (*seen, path.resolve())))
    return merge(below, tree)


def _bases(path: Path, value: Any) -> list[str]:
    names = value if isinstance(value, list) else [] if value is None else [value]
    for name in names:
        if not isinstance(name, str) or "\0" in name:
            raise ConfigError(
                f"{path}: base: {shown(name)} is no file; name YAML files, [a.yaml, b.yaml]"
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
    """Turns a tree of plain values into a `Config`; settings of before are understood.

    Which words and numbers a setting may have is for `checks.check_config` to say, all at once.

    Raises:
        ConfigError: all unknown keys (with the nearest known ones) and values of a wrong type.
    """
    return build(Config, translated(tree), "")


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
