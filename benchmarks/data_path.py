"""How fast images become tiles, how long training waits for them, what an index costs.

    python benchmarks/data_path.py                 # everything, about ten minutes on two cores
    python benchmarks/data_path.py images packing  # some parts: images, wait, index, packing

Every part prints a table and adds its numbers to --output (JSON). `images` compares one process of
this project's loader with Pillow and the Hugging Face processor in two DataLoader workers, on the
same files, in turns, so that other load on the machine meets both.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
GRIDS = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (1, 4), (4, 1))
SIZE = 384
THREADS = 2


def main() -> int:
    """Runs the parts that were asked for."""
    parts = {"images": images, "wait": wait, "index": index, "packing": packing}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=[])
    parser.add_argument("--images", type=int, default=96, help="JPEG files of 1 to 2 megapixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lines", type=int, default=1_000_000, help="annotation lines of `index`")
    parser.add_argument("--steps", type=int, default=100, help="training steps of `wait`")
    parser.add_argument("--output", type=Path, default=Path("data_path.json"))
    chosen = parser.parse_args()
    found = json.loads(chosen.output.read_text()) if chosen.output.exists() else {}
    found["machine"] = machine()
    for name in chosen.parts or parts:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = parts[name](chosen, Path(folder))
        chosen.output.write_text(json.dumps(found, indent=1) + "\n")
        say(f"\n{name}", found[name])
    return 0


def machine() -> dict[str, Any]:
    """What it ran on."""
    import importlib.metadata as metadata

    names = ("torch", "transformers", "pillow", "numpy", "nvidia-dali-cuda120")
    versions = {name: metadata.version(name) for name in names if _has(name)}
    load = f"{os.getloadavg()[0]:.1f}"
    return {"cores": os.cpu_count(), "python": platform.python_version(), **versions, "load": load}


def _has(name: str) -> bool:
    import importlib.metadata as metadata

    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def say(title: str, rows: dict[str, Any]) -> None:
    """A small table."""
    sys.stdout.write(title + "\n")
    for name, value in rows.items():
        sys.stdout.write(f"  {name:<44} {value}\n")
    sys.stdout.flush()


# --- images -------------------------------------------------------------------------------------


def images(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Images a second, square and AnyRes, in turns with the peer."""
    import torch

    from dattn_mcore.data.images import ImageLoader, ImageRequest
    from dattn_mcore.data.tiles import plan_tiles

    torch.set_num_threads(1)
    paths = make_jpegs(folder, chosen.images)
    sizes = [_size(path) for path in paths]
    result: dict[str, Any] = {"images": len(paths)}
    for name, policy in (("square", "stretch"), ("anyres", "anyres_letterbox")):
        plans = [plan_tiles(*size, policy=policy, tile_size=SIZE, grids=GRIDS) for size in sizes]
        requests = [
            ImageRequest(path.name, path.read_bytes, plan.num_tiles, plan.grid)
            for path, plan in zip(paths, plans, strict=True)
        ]
        loader = ImageLoader(size=SIZE, policy=policy, grids=GRIDS, backend="dali", threads=THREADS)
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
    from PIL import Image

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
    from PIL import Image

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
        from PIL import Image

        if self.processor is None:
            self.processor = peer_processor(self.policy)
        with Image.open(io.BytesIO(self.paths[index].read_bytes())) as opened:
            image = opened.convert("RGB")
        return self.processor(image, return_tensors="pt")["pixel_values"]


def peer_processor(policy: str) -> Any:
    """The Pillow processors of transformers, SigLIP's mean and deviation."""
    if policy == "stretch":
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        return SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    return LlavaNextImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_grid_pinpoints=[[rows * SIZE, columns * SIZE] for columns, rows in GRIDS],
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def peer_loader(paths: list[Path], policy: str) -> Any:
    """Returns a function that loads all images in two workers and gives images a second."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        PeerImages(paths, policy),  # type: ignore[arg-type]
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


# --- wait ---------------------------------------------------------------------------------------


def wait(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The share of a digits training run's time that is spent waiting for data."""
    subprocess.run(
        [
            *(sys.executable, str(ROOT / "pretrain_dattn.py"), f"train.steps={chosen.steps}"),
            *(
                f"log.run_dir={folder / 'run'}",
                f"data.annotations={folder / 'digits/pretrain.json'}",
            ),
            *(f"data.image_folder={folder / 'digits/images'}", "log.tensorboard=false"),
            *(f"data.tokenizer={folder / 'digits/tokenizer.model'}", "--device", "cpu"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    first, *later = [row["data_wait_share"] for row in rows]
    share = statistics.mean(later)
    return {
        "steps": rows[-1]["step"],
        "time spent waiting for data": f"{100 * share:.2f} %",
        "in the first interval (the queue fills)": f"{100 * first:.2f} %",
        "samples/s": round(rows[-1]["samples_per_second"], 1),
    }


# --- index --------------------------------------------------------------------------------------

_TRAINER = """
import json, os, sys, time
import psutil
from dattn_mcore.config.load import load_config
from dattn_mcore.data.pipeline import DataPipeline
from dattn_mcore.data.tokenizer import load_tokenizer
config = load_config(None, json.loads(sys.argv[1]))
tokenizer = load_tokenizer(config.data.tokenizer)
before = psutil.Process().memory_info().rss
started = time.perf_counter()
data = DataPipeline(config, tokenizer, dp_rank=0, dp_size=1, microbatch_multiple=1,
                    needs_pixels=False)
batch = data.global_batch(0)
seconds = time.perf_counter() - started
for step in range(1, 20):
    data.global_batch(step * 500)
added = psutil.Process().memory_info().rss - before
print(json.dumps([data.num_samples, seconds, added]))
data.close()
"""


def index(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """An index of many synthetic annotation lines, and what opening it costs a trainer."""
    from PIL import Image

    from dattn_mcore.data.tokenizer import train_tokenizer

    (folder / "images").mkdir()
    for number in range(1000):
        Image.new("RGB", (64 + number % 50, 64)).save(folder / "images" / f"{number}.jpg")
    words = [
        "a",
        "the",
        "cat",
        "dog",
        "red",
        "blue",
        "left",
        "right",
        "of",
        "on",
        "under",
        "is",
        "are",
        "two",
        "three",
        "house",
        "tree",
    ]
    train_tokenizer([" ".join(words)] * 10, folder / "tokenizer.model")
    rng = random.Random(0)
    with open(folder / "lines.jsonl", "w") as lines:
        for number in range(chosen.lines):
            answer = " ".join(rng.choices(words, k=rng.randint(5, 40)))
            turns = [
                {"from": "human", "value": "<image>\nwhat is it?"},
                {"from": "gpt", "value": answer},
            ]
            image = f"{number * 1000 // chosen.lines}.jpg"
            record = {"id": str(number), "image": image, "conversations": turns}
            lines.write(json.dumps(record) + "\n")
    settings = [
        *(f"data.annotations={folder / 'lines.jsonl'}", "data.prepare=none"),
        *(f"data.image_folder={folder / 'images'}", f"data.tokenizer={folder / 'tokenizer.model'}"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    command = [sys.executable, "-m", "dattn_mcore.data", "index", "--workers", "2", *settings]
    subprocess.run(command, check=True, env=environment)
    made = time.perf_counter() - started
    done = subprocess.run(
        [sys.executable, "-c", _TRAINER, json.dumps(settings)],
        check=True,
        env=environment,
        capture_output=True,
        text=True,
    )
    samples, seconds, added = json.loads(done.stdout.splitlines()[-1])
    size = sum(file.stat().st_size for file in (folder / ".index").rglob("*") if file.is_file())
    return {
        "annotation lines": samples,
        "file, MB": round((folder / "lines.jsonl").stat().st_size / 1e6),
        "index made in, seconds (2 processes)": round(made, 1),
        "index made, samples/s": round(samples / made),
        "index, MB": round(size / 1e6),
        "trainer: start to first batch, seconds": round(seconds, 2),
        "trainer: added memory after 20 steps, MB": round(added / 1e6, 1),
    }


# --- packing ------------------------------------------------------------------------------------


def llava_like(rng: random.Random, anyres: bool) -> tuple[int, int]:
    """(text rows, visual rows) like LLaVA's instruction mix.

    6 % text only and long (ShareGPT), the rest one image with one or several short turns (VQA) or
    one long answer (detail, captions); 729 rows a view, up to five views.
    """
    if rng.random() < 0.06:
        return min(2048, max(30, round(rng.lognormvariate(6.5, 0.7)))), 0
    mean, spread = rng.choice([(4.6, 0.5), (5.3, 0.4), (6.0, 0.6)])
    text = min(2048, max(12, round(rng.lognormvariate(mean, spread))))
    views = rng.choices([3, 4, 5], [0.45, 0.15, 0.4])[0] if anyres else 1
    return text, 729 * views


def packing(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """How full packs get, and how even the ranks' work is, with the budgets of configs/."""
    from dattn_mcore.config.load import load_config
    from dattn_mcore.data.balance import row_work, split_over_ranks
    from dattn_mcore.data.packing import plan_packs

    result: dict[str, Any] = {}
    for name, anyres in (("square", False), ("anyres", True)):
        config = load_config(ROOT / "configs" / "gemma_it.yaml")
        budgets = (config.data.text_budget, config.data.visual_budget * (2 if anyres else 1))
        work, size = row_work(config), config.train.global_batch_size
        for dp_size in (1, 2, 4):
            rng = random.Random(1)
            packs_made, rows, heaviest, seconds = 0, [0, 0], [], 0.0
            for _ in range(60):
                lengths = [llava_like(rng, anyres) for _ in range(size)]
                started = time.perf_counter()
                packs = plan_packs(lengths, *budgets, dp_size)
                shares = split_over_ranks(packs, lengths, dp_size, budgets, work)
                seconds += time.perf_counter() - started
                packs_made += len(packs)
                rows = [rows[kind] + sum(pair[kind] for pair in lengths) for kind in (0, 1)]
                loads = [
                    sum(lengths[i][0] * work[0] + lengths[i][1] * work[1] for p in s for i in p)
                    for s in shares
                ]
                heaviest.append(max(loads) * dp_size / sum(loads) - 1)
            fills = [rows[kind] / packs_made / budgets[kind] for kind in (0, 1)]
            result[f"{name}, dp {dp_size}: text / visual budget filled"] = (
                f"{100 * fills[0]:.1f} % / {100 * fills[1]:.1f} %"
            )
            result[f"{name}, dp {dp_size}: heaviest rank over the mean"] = (
                f"{100 * max(heaviest):.2f} % at most; {1000 * seconds / 60:.0f} ms to plan a step"
            )
    return result


if __name__ == "__main__":
    sys.exit(main())
