"""A folder of `peft` on an exported model: loaded by `peft`, added to the weights, checked."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dattn_mcore.checkpoint.base_sums import EXPORTED, check_same_base, sums_in, sums_of
from dattn_mcore.errors import CheckpointError, ConfigError
from dattn_mcore.evaluation.files import read_object
from dattn_mcore.parallel.packages import import_problem

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_adapter_folder(folder: Path) -> Any:
    """Checks what shows at once, before a model is loaded.

    Returns:
        The module `peft`.

    Raises:
        CheckpointError: the folder is none of `peft`, or holds a pickle instead of safetensors.
        ConfigError: `peft` is not installed.
    """
    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"--adapter {folder} has no {name}; give a folder that mcore-to-hf --adapter peft "
                "or peft's save_pretrained has written"
            )
    kind = read_object(folder / SETTINGS, "adapter").get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"--adapter {folder} is of {kind!r} in its {SETTINGS}; not LORA")
    if problem := import_problem("peft"):
        raise ConfigError(
            f"--adapter needs the package peft, which {problem}; pip install peft, or export the "
            "run with mcore-to-hf --adapter merged"
        )
    return importlib.import_module("peft")  # optional


def with_adapter(model: Any, folder: Path) -> Any:
    """The model with an adapter added to its weights.

    Raises:
        CheckpointError: the adapter is damaged, or of another base model.
        ConfigError: `peft` is not installed.
    """
    peft = check_adapter_folder(folder)
    try:
        if (sums := sums_in(folder / WEIGHTS)) is not None:
            first, second = sums_of(model.get_parameter(EXPORTED)).tolist()
            check_same_base(f"--adapter {folder}", sums, (first, second))
        with warnings.catch_warnings():
            # Of missing tensors; they are refused below. Others, of the device, are shown.
            warnings.filterwarnings("ignore", module=r"peft\.")
            adapted = peft.PeftModel.from_pretrained(model, str(folder))
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            found = set(file.keys())
    except CheckpointError:
        raise
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"--adapter {folder} is damaged ({reason}); copy it again") from error
    except Exception as error:  # peft raises whatever its parts raise
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"--adapter {folder} does not fit this model ({reason}); is it of another base?"
        ) from error
    wanted = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if other := sorted(wanted ^ found):
        where = "lacks" if other[0] in wanted else "has"
        raise CheckpointError(
            f"--adapter {folder} does not fit this model: it {where} {other[0]}; is it of another "
            "base?"
        )
    return adapted.merge_and_unload()
