"""Folders of `peft`: `adapter_config.json` and `adapter_model.safetensors`, read and written.

`peft` itself is not needed for that.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dattn_mcore.architectures.adapters import PEFT_PREFIX, Adapters, adapter_table
from dattn_mcore.architectures.parameters import PROJECTOR, TOWER, Entry, part_of
from dattn_mcore.architectures.sizes import ModelConfig
from dattn_mcore.architectures.tables import model_table
from dattn_mcore.checkpoint.base_sums import Sums, metadata_of, sums_in
from dattn_mcore.checkpoint.mixing import join
from dattn_mcore.errors import CheckpointError
from dattn_mcore.types import Part

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Modules of the exported model, as `modules_to_save` names them.
MODULES: dict[Part, str] = {
    "vision": TOWER.rstrip(".").rpartition(".")[2],
    "projector": PROJECTOR.rstrip(".").rpartition(".")[2],
}
# Settings of `peft` that change what an adapter computes, with the values that this trainer knows.
_KNOWN: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "use_rslora": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    # Others change the weights of the base, or their names say that they do.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
    "trainable_token_indices": (None,),
    "lora_bias": (None, False),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
}


@dataclass(frozen=True)
class PeftFolder:
    """Adapters that `peft` has saved.

    Attributes:
        tensors: by their names there.
        table: lines of what it holds, adapters first; by the names of `peft`.
        base_sums: of the base that they learnt beside (`base_sums`); None: it is not known.
    """

    tensors: Mapping[str, torch.Tensor]
    table: tuple[Entry, ...]
    base_sums: Sums | None = None

    def value(self, entry: Entry, layer: int) -> torch.Tensor:
        """The whole tensor of one layer of a line's stack (any layer, of a line without)."""
        names = entry.names(None if entry.layers is None else layer)
        return join(entry, [self.tensors[name] for name in names])


def read_peft_folder(
    folder: Path, model: ModelConfig, adapters: Adapters, setting: str = "lora.init_from"
) -> PeftFolder:
    """Reads adapters of this model and of these settings.

    Args:
        folder: of `peft`.
        model: beside whose linears they stand.
        adapters: what they must be.
        setting: that names the folder, for messages.

    Raises:
        CheckpointError: it is missing or damaged, or holds other adapters.
    """
    where = f"{setting}={folder}"
    settings = _read_settings(where, folder / SETTINGS)
    _check_settings(where, settings, adapters)
    tensors, sums = _read_tensors(where, folder / WEIGHTS)
    table = adapter_table(model, adapters)
    table += _whole_parts(where, model, settings.get("modules_to_save") or [])
    expected = {
        name: shape
        for entry in table
        for layer in entry.steps()
        for name, shape in zip(entry.names(layer), entry.parts.values(), strict=True)
    }
    for name, shape in expected.items():
        if name not in tensors:
            other = next(iter(sorted(tensors.keys() - expected.keys())), None)
            raise CheckpointError(
                f"{where} is an adapter of another base model, or of other linears: it lacks {name}"
                + (f" and has {other}" if other else "")
                + "; lora.targets must match the linears that it adapts"
            )
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"{where} is an adapter of another base model: {name} is "
                f"{list(tensors[name].shape)} there and {list(shape)} here"
            )
    if more := sorted(tensors.keys() - expected.keys()):
        raise CheckpointError(
            f"{where} is an adapter of another base model, or of other linears: it has {more[0]}, "
            "which is not adapted here; lora.targets must match the linears that it adapts"
        )
    return PeftFolder(tensors, tuple(entry for entry in table if entry.key is not None), sums)


def _whole_parts(where: str, model: ModelConfig, modules: Sequence[str]) -> list[Entry]:
    """Lines, by the names of `peft`, of the parts that learnt as a whole beside the adapters."""
    parts = {MODULES[part]: part for part in MODULES}
    if other := sorted(set(modules) - parts.keys()):
        raise CheckpointError(
            f"{where}: {SETTINGS} has {other[0]!r} in modules_to_save; beside adapters this "
            f"trainer knows {' and '.join(parts)} as a whole; use an adapter without it"
        )
    wanted = {parts[module] for module in modules}
    return [
        replace(entry, parts={peft_name(name): shape for name, shape in entry.parts.items()})
        for entry in model_table(model)
        if part_of(next(iter(entry.parts))) in wanted
    ]


def _read_settings(where: str, path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{where} is no folder of peft: {SETTINGS} cannot be read ({error.strerror}); name a "
            "folder that peft's save_pretrained or mcore-to-hf --adapter peft has written"
        ) from None
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{where}: {SETTINGS} is damaged; copy the folder again")
    return settings


def _check_settings(where: str, settings: dict[str, Any], adapters: Adapters) -> None:
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{where}: {SETTINGS} is of {settings.get('peft_type')!r}; only LORA is known"
        )
    for name, known in _KNOWN.items():
        if settings.get(name) not in known:
            raise CheckpointError(
                f"{where}: {SETTINGS} has {name}={settings[name]!r}, which this trainer cannot "
                "compute; use an adapter without it"
            )
    for ours, theirs in (("rank", "r"), ("alpha", "lora_alpha"), ("dora", "use_dora")):
        have, want = settings.get(theirs, False), getattr(adapters, ours)
        if have != want:
            raise CheckpointError(
                f"{where} has {theirs}={have!r}, and lora.{ours} is {want!r}; set both the same"
            )


def _read_tensors(where: str, path: Path) -> tuple[dict[str, torch.Tensor], Sums | None]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, sums_in(path)
    except FileNotFoundError:
        raise CheckpointError(f"{where} lacks {WEIGHTS}; copy the folder again") from None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{where}: {WEIGHTS} is damaged ({reason}); copy the folder again"
        ) from None


def write_peft_folder(
    folder: Path,
    adapters: Adapters,
    tensors: Mapping[str, torch.Tensor],
    *,
    base: str | None,
    base_sums: Sums | None = None,
    parts: Collection[Part] = (),
) -> None:
    """Writes adapters as `peft` saves them.

    Args:
        folder: an empty one.
        adapters: their settings.
        tensors: by the names of `peft`.
        base: name or folder of the exported base model, for whoever loads the adapters by it.
        base_sums: of the base, for whoever starts from the folder; None: not known.
        parts: of the model, that learnt as a whole beside them.
    """
    alpha = float(adapters.alpha)
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": adapters.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": adapters.dropout,
        "use_dora": adapters.dora,
        "bias": "none",
        "target_modules": sorted(name.removesuffix(".weight") for name in adapters.targets),
        "modules_to_save": sorted(MODULES[part] for part in parts) or None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / SETTINGS).write_text(text, encoding="utf-8")
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, folder / WEIGHTS, metadata={"format": "pt", **metadata_of(base_sums)})


def peft_name(name: str) -> str:
    """Name in a folder of `peft` of a tensor of the exported model."""
    return f"{PEFT_PREFIX}{name}"
