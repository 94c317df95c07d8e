"""Images a second: this project's loader against Pillow and the Hugging Face processor."""

from __future__ import annotations

import argparse
import io
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from dattn_mcore.config.schema import ANYRES_GRIDS
from dattn_mcore.data.images import ImageLoader, ImageRequest
from dattn_mcore.data.tiles import choose_tiling

SIZE = 384
THREADS = 2


def images(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Images a second, square and AnyRes, in turns with the peer."""
    torch.set_num_threads(1)
    paths = make_jpegs(folder, chosen.images)
    sizes = [_size(path) for path in paths]
    result: dict[str, Any] = {"images": len(paths)}
    for name, policy in (("square", "stretch"), ("anyres", "anyres_letterbox")):
        plans = [
            choose_tiling(*size, policy=policy, tile_size=SIZE, grids=ANYRES_GRIDS)
            for size in sizes
        ]
        requests = [
            ImageRequest(path.name, path.read_bytes, plan.num_tiles, plan.grid)
            for path, plan in zip(paths, plans, strict=True)
        ]
        loader = ImageLoader(
            size=SIZE, policy=policy, grids=ANYRES_GRIDS, backend="dali", threads=THREADS
        )
        loader.load(requests[:8])  # builds the pipeline
        peer = peer_loader(paths, policy)
        ours, theirs = [], []
        for _ in range(chosen.repeats):
            started = time.perf_counter()
            tiles, failures = loader.load(requests)
            ours.append(len(paths) / (time.perf_counter() - started))
            assert not failures and len(tiles) == sum(plan.num_tiles for plan in plans)
            theirs.append(peer())
        loader.close()
        mean_tiles = sum(plan.num_tiles for plan in plans) / len(plans)
        result |= {
            f"{name}: tiles an image": round(mean_tiles, 2),
            f"{name}: this project, images/s": round(statistics.median(ours), 1),
            f"{name}: Pillow + Hugging Face, 2 workers, images/s": round(
                statistics.median(theirs), 1
            ),
            f"{name}: ratio": round(
                statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 2
            ),
        }
    return result


def make_jpegs(folder: Path, count: int) -> list[Path]:
    """JPEGs of 1 to 2 megapixels with the detail of photographs: noise at every scale."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        width = int(rng.integers(1000, 1700))
        height = int(rng.integers(1_000_000, 2_000_000)) // width
        shape = np.zeros((height, width, 3), np.float32)
        for scale in (4, 16, 64, 256):
            small = rng.random((height // scale + 2, width // scale + 2, 3), np.float32)
            layer = Image.fromarray((small * 255).astype(np.uint8)).resize((width, height))
            shape += np.asarray(layer, np.float32) / 4
        path = folder / f"{number}.jpg"
        Image.fromarray(shape.astype(np.uint8)).save(path, quality=90)
        paths.append(path)
    return paths


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as opened:
        return opened.size


class PeerImages:
    """A data set as users of transformers write it: open, convert, process."""

    def __init__(self, paths: list[Path], policy: str) -> None:
        self.paths, self.policy = paths, policy
        self.processor: Any = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        if self.processor is None:
            self.processor = peer_processor(self.policy)
        with Image.open(io.BytesIO(self.paths[index].read_bytes())) as opened:
            image = opened.convert("RGB")
        return self.processor(image, return_tensors="pt")["pixel_values"]


def peer_processor(policy: str) -> Any:
    """The Pillow processors of transformers, SigLIP's mean and deviation."""
    if policy == "stretch":
        return SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_grid_pinpoints=[[rows * SIZE, columns * SIZE] for columns, rows in ANYRES_GRIDS],
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def peer_loader(paths: list[Path], policy: str) -> Any:
    """Returns a function that loads all images in two workers and gives images a second."""
    loader = DataLoader(
        PeerImages(paths, policy),
        batch_size=None,
        num_workers=2,
        persistent_workers=True,
        prefetch_factor=4,
        multiprocessing_context="forkserver",
    )

    def run() -> float:
        started = time.perf_counter()
        for _ in loader:
            pass
        return len(paths) / (time.perf_counter() - started)

    run()  # workers start, import and make their processor
    return run
