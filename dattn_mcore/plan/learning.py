"""What the optimizer does with the parameters of the whole model, as the dry run prints it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dattn_mcore.architectures.adapters import adapter_table
from dattn_mcore.architectures.parameters import part_of
from dattn_mcore.architectures.tables import model_table
from dattn_mcore.config.lora import adapters_of
from dattn_mcore.config.optim_groups import TensorSettings, resolved
from dattn_mcore.config.schema import Config

_WIDTH = 60  # characters of a group's patterns


@dataclass
class _Line:
    """Tensors that one part's or one group's settings hold for, all learning or all frozen."""

    parameters: int = 0
    settings: list[TensorSettings] = field(default_factory=list)


def learning_lines(config: Config) -> list[str]:
    """A line for each part and group: parameters of the whole model, rates, weight decay, betas.

    Args:
        config: a checked configuration.
    """
    rows = [("settings of", "parameters", "peak learning rate", "weight decay", "betas")]
    for (name, learns), line in _grouped(config).items():
        count = f"{line.parameters:,}"
        if not learns:
            rows.append((name, count, "frozen", "", ""))
            continue
        decay = _range({it.weight_decay for it in line.settings if it.decays} or {0.0})
        betas = {(it.beta1, it.beta2) for it in line.settings}
        shown = " or ".join(f"{one:g}, {two:g}" for one, two in sorted(betas))
        rows.append((name, count, _range({it.lr for it in line.settings}), decay, shown))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return [
        f"{name:<{widths[0]}}  {count:>{widths[1]}}  {rate:<{widths[2]}}  {decay:<{widths[3]}}  "
        f"{betas}".rstrip()
        for name, count, rate, decay, betas in rows
    ]


def _grouped(config: Config) -> dict[tuple[str, bool], _Line]:
    """By part or group and whether it learns, parts first."""
    table = resolved(config)
    lines: dict[tuple[str, bool], _Line] = {}
    numbers: dict[tuple[str, bool], int] = {}
    adapters = adapters_of(config)
    added = [] if adapters is None else adapter_table(config.model, adapters)
    for entry in [*model_table(config.model), *added]:
        if entry.key is None:
            continue
        part = "adapters" if entry in added else part_of(entry.key)
        for number in entry.all_numbers():
            settings = table[entry.key, number]
            name = part if settings.group is None else _name(config, settings.group)
            key = (name, settings.trains)
            line = lines.setdefault(key, _Line())
            numbers[key] = -1 if settings.group is None else settings.group
            line.parameters += math.prod(entry.layer_shape())
            line.settings.append(settings)
    return dict(sorted(lines.items(), key=lambda item: numbers[item[0]]))


def _name(config: Config, number: int) -> str:
    patterns = ", ".join(config.optim.groups[number].patterns)
    short = patterns if len(patterns) <= _WIDTH else f"{patterns[: _WIDTH - 3]}..."
    return f"optim.groups[{number}] ({short})"


def _range(values: set[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"
