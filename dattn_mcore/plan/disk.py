"""Bytes on disk of a run's checkpoints and exports, from the parameter table.

A checkpoint holds every weight in its own dtype, and of each that learns a float32 copy and Adam's
two moments, whatever the layout; with an EMA a float32 mean more. With adapters it holds only what
learns. Its index, manifest, RNG states
and the headers of tensors come on top: some kilobytes a tensor and rank. An export holds the
weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dattn_mcore.architectures.adapters import adapted_table
from dattn_mcore.architectures.parameters import Entry
from dattn_mcore.architectures.tables import model_table
from dattn_mcore.config.lora import adapters_of
from dattn_mcore.config.optim_groups import layers_differ, resolved
from dattn_mcore.config.schema import Config
from dattn_mcore.config.scores_rules import MOST_PENDING, asks
from dattn_mcore.plan.parameters import BYTES

OPTIMIZER_BYTES = 3 * 4  # of a parameter that learns: copy, mean and mean square, all float32
EMA_BYTES = 4
_UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"))


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of one checkpoint and of its export.

    Attributes:
        weights: of the model; with adapters, of what learns.
        optimizer: its state.
        ema: running mean of the weights; 0 without one.
        export: weights of the Hugging Face folder; its tokenizer and code are not counted.
    """

    weights: int
    optimizer: int
    ema: int
    export: int

    @property
    def total(self) -> int:
        """Bytes of the checkpoint."""
        return self.weights + self.optimizer + self.ema


def checkpoint_size(config: Config) -> CheckpointSize:
    """Bytes of a checkpoint of this run; the same in every layout."""
    weights = numbers = learns = export = 0
    table, adapters = resolved(config), adapters_of(config)
    for entry in model_table(config.model):
        export += (
            _width(config, entry) * len(entry.steps()) * sum(map(math.prod, entry.parts.values()))
        )
    for entry in adapted_table(config.model, adapters):
        if entry.key is None:
            continue
        numel = math.prod(entry.layer_shape())
        learning = numel * sum(table[entry.key, number].trains for number in entry.all_numbers())
        numbers += numel * len(entry.steps())
        learns += learning
        # With adapters what learns is saved, and the rest is another checkpoint's.
        saved = numel * len(entry.steps()) if adapters is None else learning
        weights += _width(config, entry) * saved
    ema = 0
    if config.train.ema_decay is not None:  # where layers differ, `Ema` keeps all weights
        ema = EMA_BYTES * (numbers if layers_differ(config) else learns)
    return CheckpointSize(weights, OPTIMIZER_BYTES * learns, ema, export)


def _width(config: Config, entry: Entry) -> int:
    return BYTES["fp32" if entry.dtype == "float32" else config.train.precision]


def disk_lines(config: Config) -> list[str]:
    """What checkpoints and exports take on disk at most, a line each."""
    checkpoint, size = config.checkpoint, checkpoint_size(config)
    parts = [f"weights {_bytes(size.weights)}", f"optimizer {_bytes(size.optimizer)}"]
    parts += [f"EMA {_bytes(size.ema)}"] if size.ema else []
    stay, which = _staying(config)
    most = f"{_bytes((stay + 1) * size.total)} with the one that is being written"
    if checkpoint.keep_every is not None and config.train.steps is None:
        most += f", and one more each {checkpoint.keep_every:,} steps"
    lines = [
        f"disk: a checkpoint takes {_bytes(size.total)} ({', '.join(parts)}); at most {stay} stay "
        f"({which}): {most}"
    ]
    if checkpoint.also_export:
        lines.append(
            f"disk: an export takes {_bytes(size.export)}; at most {stay} stay: "
            f"{_bytes((stay + 1) * size.export)} with the one that is being written"
        )
    if asks(config):
        each = "; each scored checkpoint leaves one" if config.scores.keep_export else ""
        lines.append(
            f"disk: the export that answers questions takes {_bytes(size.export)} in scores/{each}"
        )
    return lines


def _staying(config: Config) -> tuple[int, str]:
    """How many checkpoints stay at most, and by which rules; of every m-th if steps are known."""
    checkpoint, steps = config.checkpoint, config.train.steps
    counts = [(checkpoint.keep, f"{checkpoint.keep} newest")]
    if checkpoint.keep_best:
        counts.append((checkpoint.keep_best, f"{checkpoint.keep_best} best"))
    if checkpoint.keep_every is not None:
        often = steps // checkpoint.keep_every if steps is not None else 0
        name = f"every {checkpoint.keep_every:,} steps"
        counts.append((often, name if steps is None else f"{often} of {name}"))
    if asks(config):  # those that wait for their turn are in use
        pending = 1 if config.scores.wait else MOST_PENDING + 1
        counts.append((pending, f"{pending} being scored"))
    if checkpoint.also_export:
        counts.append((1, "1 being exported"))
    most = sum(number for number, _ in counts)
    if steps is not None and (saves := math.ceil(steps / checkpoint.save_interval)) < most:
        return saves, "all that are saved"
    return most, " + ".join(name for _, name in counts)


def _bytes(number: int) -> str:
    for size, unit in _UNITS:
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1000:.1f} kB"
