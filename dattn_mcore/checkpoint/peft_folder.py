"""Folders of `peft`: `adapter_config.json` and `adapter_model.safetensors`, read and written.

`peft` itself is not needed for that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dattn_mcore.architectures.adapters import PEFT_PREFIX, Adapters, adapter_table
from dattn_mcore.architectures.parameters import Entry
from dattn_mcore.architectures.sizes import ModelConfig
from dattn_mcore.checkpoint.mixing import join
from dattn_mcore.errors import CheckpointError

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Settings of `peft` that change what an adapter computes, with the values that this trainer knows.
_KNOWN: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "use_rslora": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
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
    """

    tensors: Mapping[str, torch.Tensor]

    def value(self, entry: Entry, layer: int) -> torch.Tensor:
        """The whole tensor of one layer of a line's stack."""
        return join(entry, [self.tensors[name] for name in entry.names(layer)])


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
    _check_settings(where, _read_settings(where, folder / SETTINGS), adapters)
    tensors = _read_tensors(where, folder / WEIGHTS)
    expected = {
        name: shape
        for entry in adapter_table(model, adapters)
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
    return PeftFolder(tensors)


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


def _read_tensors(where: str, path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{where} lacks {WEIGHTS}; copy the folder again") from None
    except (SafetensorError, OSError) as error:
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
    parts: tuple[str, ...] = (),
) -> None:
    """Writes adapters as `peft` saves them.

    Args:
        folder: an empty one.
        adapters: their settings.
        tensors: by the names of `peft`.
        base: name or folder of the exported base model, for whoever loads the adapters by it.
        parts: modules of the exported model that learnt as a whole beside them.
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
        "modules_to_save": sorted(parts) or None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / SETTINGS).write_text(text, encoding="utf-8")
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})


def peft_name(name: str) -> str:
    """Name in a folder of `peft` of a tensor of the exported model."""
    return f"{PEFT_PREFIX}{name}"
