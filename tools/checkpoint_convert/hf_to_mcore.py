"""Exported Hugging Face folder to Megatron-Core checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dattn_mcore.config.schema import Config, DataConfig
from dattn_mcore.errors import CheckpointError
from dattn_mcore.hf import DattnConfig
from tools.checkpoint_convert.configs import from_hf
from tools.checkpoint_convert.dist_checkpoint import AtomicFolder, write_checkpoint
from tools.checkpoint_convert.safetensors_folder import SafetensorsFolder
from tools.checkpoint_convert.tables import check_keys, hf_shapes, model_table

Progress = Callable[[int, int], None]
TEMPLATES = {"mistral": "mistral", "gemma2": "gemma"}


def read_hf_config(folder: Path) -> DattnConfig:
    """Reads config.json of an exported folder, without running code from it.

    Raises:
        CheckpointError: it is missing, no JSON, or of another model type.
    """
    file = folder / "config.json"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        kind = fields.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({' '.join(str(error).split())}); give an exported folder"
        ) from None
    if kind != "dattn":
        raise CheckpointError(f"{file}: model_type is {kind!r}; only 'dattn' folders are converted")
    try:
        return DattnConfig.from_dict(fields)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: {' '.join(str(error).split())}") from None


def convert(
    folder: str | Path,
    output: str | Path,
    vocab_pad_multiple: int = 128,
    progress: Progress = lambda done, total: None,
) -> None:
    """Writes a checkpoint that a run can start from (`checkpoint.init_from`).

    Args:
        folder: exported folder.
        output: checkpoint folder to make.
        vocab_pad_multiple: the embedding gets zero rows up to a multiple of this.
        progress: called after every tensor with bytes done and in all.

    Raises:
        CheckpointError: the folder is damaged or of another model, or the output exists.
    """
    folder = Path(folder)
    hf_config = read_hf_config(folder)
    model, attention = from_hf(hf_config, vocab_pad_multiple)
    source = SafetensorsFolder(folder)
    table = model_table(model)
    check_keys(str(folder), hf_shapes(table), source.shapes)
    config = Config(
        model=model,
        attention=attention,
        data=replace(
            _image_settings(folder),
            template=TEMPLATES[model.family],
            tokenizer=str(folder.resolve()),
            prepare="none",
        ),
    )
    total = source.total_bytes
    done = 0
    tensors: dict[tuple[str, int | None], Tensor] = {}
    with AtomicFolder(output) as temporary:
        for entry in table:
            for layer in entry.steps():
                names = entry.names(layer)
                parts = [source.read(name) for name in names]
                kinds = {part.dtype for part in parts}
                if len(kinds) > 1:
                    raise CheckpointError(
                        f"{folder}: {', '.join(names)} have dtypes {sorted(map(str, kinds))}; they "
                        "become one tensor and must have one"
                    )
                done += sum(part.nbytes for part in parts)
                if entry.key is None:
                    if any(part.any() for part in parts):
                        raise CheckpointError(
                            f"{folder}: {', '.join(names)} must be zeros, because visual_positions "
                            "is false in config.json"
                        )
                else:
                    tensors[entry.key, layer] = entry.mix.join(parts)
                progress(done, total)
        write_checkpoint(temporary, table, tensors, config)


def _image_settings(folder: Path) -> DataConfig:
    """Image policy, mean and standard deviation of the folder's processor.

    Raises:
        CheckpointError: there is no processor.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            fields: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
            break
    else:
        raise CheckpointError(f"{folder} has no processor_config.json; give an exported folder")
    fields = fields.get("image_processor", fields)
    policy = (
        "pad" if fields.get("do_pad") else "crop" if fields.get("do_center_crop") else "stretch"
    )
    mean: Any = tuple(float(x) for x in fields["image_mean"])
    std: Any = tuple(float(x) for x in fields["image_std"])
    return replace(DataConfig(), image_policy=policy, image_mean=mean, image_std=std)
