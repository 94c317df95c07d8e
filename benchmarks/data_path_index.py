"""What an index costs a trainer, and how long training waits for data."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.results import ROOT
from dattn_mcore.data.tokenizer import train_tokenizer

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
data.steps.up_to(data.num_samples)  # as a run that counts epochs does
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
    (folder / "images").mkdir()
    for number in range(1000):
        Image.new("RGB", (64 + number % 50, 64)).save(folder / "images" / f"{number}.jpg")
    sentence = "a the cat dog red blue left right of on under is are two three house tree"
    words = sentence.split()
    train_tokenizer([sentence] * 10, folder / "tokenizer.model")
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
        f"data.annotations={folder / 'lines.jsonl'}",
        "data.prepare=none",
        f"data.image_folder={folder / 'images'}",
        f"data.tokenizer={folder / 'tokenizer.model'}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    command = [sys.executable, "-m", "dattn_mcore.data", "index", "--workers", "2", *settings]
    subprocess.run(command, check=True, env=environment)
    made = time.perf_counter() - started
    size = sum(file.stat().st_size for file in (folder / ".index").rglob("*") if file.is_file())
    result = {
        "file, MB": round((folder / "lines.jsonl").stat().st_size / 1e6),
        "index made in, seconds (2 processes)": round(made, 1),
        "index, MB": round(size / 1e6),
    }
    for kind, more in (
        ("steps of 64 samples", []),
        ("steps of full packs", ["data.step_packs_multiple=2", "train.steps=null"]),
    ):
        done = subprocess.run(
            [sys.executable, "-c", _TRAINER, json.dumps(settings + more)],
            check=True,
            env=environment,
            capture_output=True,
            text=True,
        )
        samples, seconds, added = json.loads(done.stdout.splitlines()[-1])
        result |= {
            "annotation lines": samples,
            f"{kind}: start to first batch, seconds": round(seconds, 2),
            f"{kind}: added memory after 20 steps, MB": round(added / 1e6, 1),
        }
    return result


def wait(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The share of a digits training run's time that is spent waiting for data."""
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "pretrain_dattn.py"),
            f"train.steps={chosen.steps}",
            f"log.run_dir={folder / 'run'}",
            f"data.annotations={folder / 'digits/pretrain.json'}",
            f"data.image_folder={folder / 'digits/images'}",
            "log.tensorboard=false",
            f"data.tokenizer={folder / 'digits/tokenizer.model'}",
            "--device",
            "cpu",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    # Each row is an interval of equally many steps.
    seconds = [row["seconds_per_step"] for row in rows]
    waited = [row["data_wait_share"] * took for row, took in zip(rows, seconds, strict=True)]
    return {
        "steps": rows[-1]["step"],
        "time spent waiting for data, %": round(100 * sum(waited) / sum(seconds), 2),
        "of the first tenth, while the queue fills, %": round(100 * waited[0] / seconds[0], 2),
        "samples/s": round(rows[-1]["samples_per_second"], 1),
    }
