"""What the optimizer does with each of a model's tensors: the groups, resolved tensor by tensor.

`train.trains`, `optim.lr_projector`, `optim.lr_vision` and `optim.vision_layer_decay` say it by
part; `optim.groups` by patterns over names, and wins, later groups over earlier ones. Freezing,
planner, optimizer and dry run all ask here.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

from dattn_mcore.architectures import language_models, vision_towers
from dattn_mcore.architectures.adapters import Adapters, adapter_table, by_number
from dattn_mcore.architectures.decoder import EMBEDDING, OUTPUT
from dattn_mcore.architectures.parameters import Entry, part_of
from dattn_mcore.architectures.patterns import (
    compile_pattern,
    exported_names,
    matched_parts,
    names_of,
)
from dattn_mcore.architectures.sizes import ModelConfig
from dattn_mcore.architectures.tables import model_table
from dattn_mcore.config.lora import adapters_of
from dattn_mcore.config.schedule import peak_ratio
from dattn_mcore.config.schema import Config, OptimConfig, OptimGroup
from dattn_mcore.errors import ConfigError
from dattn_mcore.types import Part

Tensor = tuple[str, int | None]  # key in the model's table, and layer of the whole model from 0

_SETTINGS = ("trains", "lr", "weight_decay", "beta1", "beta2")
NO_DECAY = (".bias", "norm.weight", "class_embedding", ".magnitude")  # ends of keys
# Of linears that add their bias themselves; Megatron-Core's others leave that to autograd.
_BIASES = ("linear_qkv.bias", "linear_q.bias", "linear_kv.bias")
_RANGE = re.compile(r"\{(\d+)\.\.\d+\}")


@dataclass(frozen=True)
class TensorSettings:
    """How one tensor is trained.

    Attributes:
        trains: it learns; otherwise it is frozen, and the rest means nothing.
        lr: peak learning rate.
        min_lr: at the end of the schedule.
        weight_decay: of its group; see `decays`.
        decays: weight decay holds for it; not for norms and biases.
        beta1: decay of Adam's mean of gradients.
        beta2: decay of Adam's mean of squared gradients.
        group: number of the last of `optim.groups` that matches it; None: its part's settings.
    """

    trains: bool
    lr: float
    min_lr: float
    weight_decay: float
    decays: bool
    beta1: float
    beta2: float
    group: int | None = None

    @property
    def adam(self) -> tuple[float, float, float, float]:
        """Rate, weight decay and both betas, by which groups of the optimizer differ."""
        return self.lr, self.weight_decay, self.beta1, self.beta2


Table = Mapping[Tensor, TensorSettings]


def learns(config: Config, key: str, layer: int | None) -> bool:
    """Whether a tensor is trained; see `settings_of`."""
    return settings_of(config, key, layer).trains


def settings_of(config: Config, key: str, layer: int | None) -> TensorSettings:
    """How a tensor is trained.

    Args:
        config: a checked configuration.
        key: in the model's table; the output layer's copy of a tied embedding goes by the latter.
        layer: number in the whole model, from 0; None for what stands in no layer.

    Raises:
        ConfigError: `optim.groups` cannot be resolved.
        KeyError: the model has no such tensor.
    """
    return resolved(config)[tensor_of(config.model, key, layer)]


def tensor_of(model: ModelConfig, key: str, layer: int | None) -> Tensor:
    """The tensor whose settings hold: of a tied output layer the embedding."""
    return (EMBEDDING if key == OUTPUT and model.llm.tie_embeddings else key), layer


def own_peaks(config: Config) -> dict[str, float]:
    """Peak rates beside `optim.lr`, by the name that a report gives the rate.

    `lr_projector`, `lr_vision`, and `lr_group_0` for the first of `optim.groups`. Of a decay over
    layers it is the rate of the last one.
    """
    optim = config.optim
    own = {"lr_projector": optim.lr_projector, "lr_vision": optim.lr_vision}
    own |= {f"lr_group_{number}": group.lr for number, group in enumerate(optim.groups)}
    return {name: lr for name, lr in own.items() if lr is not None and lr != optim.lr}


def layers_differ(config: Config) -> bool:
    """Whether a tensor learns in some layers of its stack and is frozen in others."""
    learning: dict[str, set[bool]] = {}
    for (key, _), settings in resolved(config).items():
        learning.setdefault(key, set()).add(settings.trains)
    return any(len(both) == 2 for both in learning.values())


def part_learns(config: Config, part: Part) -> bool:
    """Whether anything of a part is trained."""
    return any(it.trains for (key, _), it in resolved(config).items() if part_of(key) == part)


def resolved(config: Config) -> Table:
    """How each tensor of the model is trained, in the order of the model's table.

    Raises:
        ConfigError: `optim.groups` cannot be resolved.
    """
    trains = tuple(config.train.trains)
    table, problems = _resolve(config.model, config.optim, trains, adapters_of(config))
    if problems:
        raise ConfigError(*problems)
    return table


def mistakes(config: Config) -> Iterator[str]:
    """One line for each rule that groups, or the tower's decay over layers, break."""
    model, optim, trains = config.model, config.optim, config.train.trains
    if not optim.groups and optim.vision_layer_decay is None:
        if not trains:
            yield f"train.trains=[] must name one or more of {', '.join(get_args(Part))}"
    elif model.family in language_models() and model.vision.kind in vision_towers():
        try:
            adapters = adapters_of(config)
        except ConfigError:  # the rule of `lora` says what is wrong
            return
        # Other names are refused elsewhere.
        problems = _resolve(model, optim, trains, adapters)[1]
        yield from problems
        if adapters is not None and not problems and layers_differ(config):
            yield (
                "optim.groups with lora.targets: a tensor of the base must learn in all layers or "
                "in none (a checkpoint of adapters holds whole stacks); name all layers, or none"
            )


@functools.lru_cache(maxsize=16)
def _resolve(
    model: ModelConfig,
    optim: OptimConfig,
    trains: tuple[Part, ...],
    adapters: Adapters | None,
) -> tuple[dict[Tensor, TensorSettings], tuple[str, ...]]:
    """The table, and what is wrong with it."""
    entries: list[tuple[Entry, str, int | None]] = [
        (entry, entry.key, layer)
        for entry in model_table(model)
        if entry.key is not None
        for layer in entry.steps()
    ]
    table = {(key, layer): _by_part(model, optim, trains, key, layer) for _, key, layer in entries}
    added = [] if adapters is None else by_number(adapter_table(model, adapters))
    if added:
        for place, settings in table.items():
            if part_of(place[0]) == "llm":  # of which adapters alone learn
                table[place] = dataclasses.replace(settings, trains=False)
        entries += added
        table |= {(key, n): _by_part(model, optim, trains, key, n) for _, key, n in added}
    tensors = [(entry, layer) for entry, _, layer in entries]
    problems: list[str] = []
    matched: list[list[Tensor]] = []
    for number, group in enumerate(optim.groups):
        try:
            matched.append(_matched(f"optim.groups[{number}]", group, tensors))
        except ConfigError as error:
            problems += error.mistakes
            matched.append([])
        given = {name: value for name in _SETTINGS if (value := getattr(group, name)) is not None}
        for tensor in matched[-1]:
            table[tensor] = _replaced(table[tensor], given, optim, number)
    if not problems:
        for number, group in enumerate(optim.groups):
            problems += _unused(f"optim.groups[{number}]", group, matched[number], table)
        problems += _of_the_whole(optim, trains, table)
        if "llm" in trains:
            problems += _frozen_adapters([(key, n) for _, key, n in added], table, optim)
    return table, tuple(problems)


def _by_part(
    model: ModelConfig, optim: OptimConfig, trains: tuple[Part, ...], key: str, layer: int | None
) -> TensorSettings:
    """Settings of a tensor without any groups."""
    part = part_of(key)
    own = {"projector": optim.lr_projector, "vision": optim.lr_vision}.get(part)
    lr = optim.lr if own is None else own
    if part == "vision" and optim.vision_layer_decay is not None:
        lr *= optim.vision_layer_decay ** _layers_above(model, key, layer)
    return TensorSettings(
        trains=part in trains,
        lr=lr,
        min_lr=lr * peak_ratio(optim),
        weight_decay=optim.weight_decay,
        decays=not key.endswith(NO_DECAY),
        beta1=optim.beta1,
        beta2=optim.beta2,
    )


def _layers_above(model: ModelConfig, key: str, layer: int | None) -> int:
    """Layers of the tower between a tensor of it and its end."""
    layers = model.vision.layers_run
    if layer is not None:
        return layers - 1 - layer
    return 0 if "final" in key else layers


def _replaced(
    settings: TensorSettings, given: dict[str, float], optim: OptimConfig, number: int
) -> TensorSettings:
    if "lr" in given:
        given = {**given, "min_lr": given["lr"] * peak_ratio(optim)}
    return dataclasses.replace(settings, group=number, **given)  # type: ignore[arg-type]


def _matched(name: str, group: OptimGroup, tensors: list[tuple[Entry, int | None]]) -> list[Tensor]:
    """Tensors that a group is about.

    Args:
        name: of the group, for messages.
        group: with patterns and settings.
        tensors: all of the model.

    Raises:
        ConfigError: a pattern is malformed or matches nothing, settings have no meaning, or
            only some of the exported tensors that one tensor here is made of are matched.
    """
    if problems := list(_values(name, group)):
        raise ConfigError(*problems)
    meant: dict[Tensor, list[bool]] = {}
    entry_of: dict[Tensor, Entry] = {}
    for pattern in group.patterns:
        matches = compile_pattern(pattern, f"{name}.patterns")
        found = False
        for entry, layer in tensors:
            parts = matched_parts(matches, entry, layer)
            if any(parts):
                found = True
                assert entry.key is not None
                before = meant.get((entry.key, layer), [False] * len(parts))
                meant[entry.key, layer] = [a or b for a, b in zip(before, parts, strict=True)]
                entry_of[entry.key, layer] = entry
        if not found:
            raise ConfigError(
                f"{name}.patterns={pattern[:100]!r} matches no parameter of this model; did you "
                f"mean {_nearest(pattern, tensors)!r}?"
            )
    for (key, layer), which in meant.items():
        if not all(which):
            names = [n[-1] for n in exported_names(entry_of[key, layer], layer)]
            yes = " and ".join(n for n, part in zip(names, which, strict=True) if part)
            no = " and ".join(n for n, part in zip(names, which, strict=True) if not part)
            raise ConfigError(
                f"{name}.patterns={list(group.patterns)} matches {yes} and not {no}: here they are "
                f"one tensor ({key}) with the same settings; match all of them or none"
            )
    return list(meant)


def _values(name: str, group: OptimGroup) -> Iterator[str]:
    """What is wrong with a group, whatever the model."""
    if not group.patterns:
        yield f"{name}.patterns=[] must have at least one pattern of names"
    if all(getattr(group, setting) is None for setting in _SETTINGS):
        yield f"{name} sets nothing; add one of {', '.join(_SETTINGS)}, or leave the group out"
    if group.lr is not None and not group.lr > 0:
        yield f"{name}.lr={group.lr} must be greater than 0; trains: false freezes parameters"
    if group.weight_decay is not None and not group.weight_decay >= 0:
        yield f"{name}.weight_decay={group.weight_decay} must be at least 0 (0: none)"
    for setting in ("beta1", "beta2"):
        value = getattr(group, setting)
        if value is not None and not 0 <= value < 1:
            yield f"{name}.{setting}={value} must be at least 0 and less than 1"


def _unused(name: str, group: OptimGroup, tensors: list[Tensor], table: Table) -> Iterator[str]:
    """Settings of a group that hold for no parameter."""
    given = [setting for setting in _SETTINGS[1:] if getattr(group, setting) is not None]
    learning = [table[tensor] for tensor in tensors if table[tensor].trains]
    if given and not learning:
        yield (
            f"{name} sets {', '.join(given)} of parameters that are all frozen; add trains: true, "
            "or leave the group out"
        )
    elif group.weight_decay and not any(settings.decays for settings in learning):
        yield (
            f"{name}.weight_decay={group.weight_decay} has no effect: norms and biases, which are "
            "all it matches, have no weight decay; leave it out"
        )


def _frozen_adapters(
    adapters: list[Tensor], table: Mapping[Tensor, TensorSettings], optim: OptimConfig
) -> Iterator[str]:
    weights = [(f"{key.rsplit('.', 2)[0]}.weight", layer) for key, layer in adapters]
    groups = [table[weight].group for weight in weights]
    if groups and all(it is not None and optim.groups[it].trains is False for it in groups):
        yield (
            f"optim.groups[{groups[0]}] freezes every linear that lora.targets gives an adapter; "
            "leave them out of the group (beside adapters they are frozen in any case), or set "
            "lora.targets=[]"
        )
        return
    frozen = [place for place in adapters if not table[place].trains]
    if frozen:
        key, layer = frozen[0]
        yield (
            f"optim.groups[{table[frozen[0]].group}] freezes {len(frozen)} of {len(adapters)} "
            f"tensors of adapters (first: {key} of layer {layer}); leave these linears out of "
            "lora.targets, or out of the group"
        )


def _of_the_whole(optim: OptimConfig, trains: tuple[Part, ...], table: Table) -> Iterator[str]:
    if not any(settings.trains for settings in table.values()):
        yield (
            f"nothing learns: train.trains={list(trains)} and optim.groups leave all parameters "
            "frozen; add trains: true to a group, or a part to train.trains"
        )
    for key, layer in table:
        if key.endswith(_BIASES) and table[key, layer].trains:
            weight = f"{key.removesuffix('.bias')}.weight"
            if not table[weight, layer].trains:
                yield (
                    f"optim.groups: {key} learns in layer {layer} and its weight is frozen, but "
                    "Megatron-Core computes no gradient of such a bias; train both or none"
                )
                break
    decay = optim.vision_layer_decay
    if decay is not None and not 0 < decay <= 1:
        yield f"optim.vision_layer_decay={decay} must be greater than 0 and at most 1, or null"
    elif decay is not None and not any(
        it.trains for (key, _), it in table.items() if part_of(key) == "vision"
    ):
        yield (
            f"optim.vision_layer_decay={decay} has no effect while the tower is frozen; add vision "
            "to train.trains, or set it to null"
        )


def _nearest(pattern: str, tensors: list[tuple[Entry, int | None]]) -> str:
    """The name, or beginning of one, that looks most like a pattern."""
    text = _RANGE.sub(r"\1", pattern)
    dots = text.count(".") + 1
    names = {
        ".".join(name.split(".")[:dots])
        for entry, layer in tensors
        for name in names_of(entry, layer)
    }
    return difflib.get_close_matches(text, sorted(names), n=1, cutoff=0.0)[0]
