"""Hugging Face folders of random bf16 weights, and whether such weights came back unchanged."""

from __future__ import annotations

import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from tools.checkpoint_convert.safetensors_folder import SafetensorsWriter

THREADS = 2


def write_folder(folder: Path, model: Any, drop: tuple[str, ...]) -> dict[str, torch.Size]:
    """Writes random weights of a model's shapes, and returns the shapes by name."""
    model.config.save_pretrained(folder)
    shapes = {name: t.shape for name, t in model.state_dict().items() if name not in drop}
    announced = {name: (tuple(shape), torch.bfloat16) for name, shape in shapes.items()}
    with (
        SafetensorsWriter(folder, announced, 5_000_000_000) as writer,
        ThreadPoolExecutor(THREADS) as threads,
    ):
        for _ in threads.map(lambda name: writer.add(name, _random(name, shapes[name])), shapes):
            pass
        writer.close(shapes)
    return shapes


def changed(made: dict[str, torch.Size], exported: Path) -> list[str]:
    """Names of tensors that are missing or changed: made anew, and read by the safetensors library.

    Args:
        made: shapes by the names in the folders that were converted.
        exported: what came back.
    """
    places = {}
    for file in exported.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dictionary)
                raw = name.replace("model.language_model.", "model.")
                places[raw.removeprefix("model.vision_tower.")] = (file, name)

    def differs(name: str) -> bool:
        if name not in places:
            return True
        file, exported_name = places[name]
        with safe_open(file, framework="pt") as opened:
            found = opened.get_tensor(exported_name)
        expected = _random(name, made[name])
        return found.dtype != expected.dtype or not torch.equal(
            found.view(torch.int16), expected.view(torch.int16)
        )

    with ThreadPoolExecutor(THREADS) as threads:
        return [n for n, bad in zip(made, threads.map(differs, made), strict=True) if bad]


def _random(name: str, shape: torch.Size) -> torch.Tensor:
    """The random bf16 tensor of a name: every finite pattern of bits below 2."""
    numbers = np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))
    count = math.prod(shape)
    bits = numbers.integers(0, 2**64, -(-count // 4), dtype=np.uint64)
    bits &= np.uint64(0xBFFFBFFFBFFFBFFF)  # no infinity, no NaN
    return torch.from_numpy(bits.view(np.int16)[:count]).view(torch.bfloat16).view(shape)
