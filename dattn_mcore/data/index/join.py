"""Joins the parts of an index that its workers wrote."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from dattn_mcore.data.index.layout import (
    BRANCH,
    IMAGE,
    OF_BRANCHES,
    OF_BYTES,
    SAMPLE,
    IndexSettings,
    digest,
    without_columns,
)
from dattn_mcore.data.record_places import RecordPlaces
from dattn_mcore.data.sources.open_files import OpenFiles


def join_parts(
    begun: Path, settings: IndexSettings, parts: list[Path], made_from: dict[str, Any]
) -> None:
    """Writes the final files beside the parts; counted first, so that nothing is held in memory."""
    counts = []
    for path in parts:
        with np.load(path) as part:
            counts.append([len(part[name]) for name in ("samples", "images", "names", "branches")])
    totals = [int(total) for total in np.sum(counts, axis=0)]
    of_samples = without_columns(SAMPLE, () if totals[3] else OF_BRANCHES)
    of_images = without_columns(IMAGE, () if settings.hash_images else OF_BYTES)
    samples = np.lib.format.open_memmap(begun / "samples.npy", "w+", of_samples, (totals[0],))
    images = np.lib.format.open_memmap(begun / "images.npy", "w+", of_images, (max(totals[1], 1),))
    branches = np.lib.format.open_memmap(begun / "branches.npy", "w+", BRANCH, (max(totals[3], 1),))
    num_branched = 0
    usable = np.lib.format.open_memmap(begun / "usable.npy", "w+", np.uint8, (totals[0],))
    files = OpenFiles(settings.files, most=1)
    places = RecordPlaces(settings.files, files.get)
    num_bad, per_file = 0, np.zeros((len(settings.files), 2), np.int64)
    done = np.zeros(4, np.int64)
    ignored: list[Counter[str]] = [Counter() for _ in settings.sources]
    source_of = [n for n, source in enumerate(settings.sources) for _ in source.files]
    with open(begun / "names.bin", "wb") as names, open(begun / "bad.jsonl", "w") as bad:
        for path, count in zip(parts, counts, strict=True):
            sample_at, image_at, name_at, branch_at = (int(number) for number in done)
            with np.load(path) as part:
                rows, pictures = part["samples"], part["images"]
                rows["name_start"] += np.uint64(name_at)
                rows["first_image"] += np.uint64(image_at)
                rows["first_branch"] += np.uint64(branch_at)
                num_branched += int((rows["num_branches"] > 0).sum())
                pictures["name_start"] += np.uint64(name_at)
                samples[sample_at : sample_at + len(rows)] = rows[list(of_samples.names or ())]
                usable[sample_at : sample_at + len(rows)] = part["usable"]
                images[image_at : image_at + len(pictures)] = pictures[list(of_images.names or ())]
                branches[branch_at : branch_at + len(part["branches"])] = part["branches"]
                names.write(part["names"].tobytes())
                np.add.at(
                    per_file, rows["file"], np.stack([part["usable"] * 0 + 1, part["usable"]], 1)
                )
                for entry in json.loads(part["bad"].tobytes()):
                    entry["sample"] += sample_at
                    number = entry["sample"] - int(per_file[: entry["file"], 0].sum())
                    entry["where"] = places.where(
                        file=entry["file"],
                        offset=entry.pop("offset"),
                        record=number,
                        field=entry.pop("field"),
                    )
                    files.make_room()
                    bad.write(json.dumps(entry) + "\n")
                    num_bad += 1
                own = ignored[source_of[int(rows["file"][0])]]
                own.update(json.loads(part["ignored"].tobytes()))
            done += count
    for table in (samples, images, branches, usable):
        table.flush()
    content = {
        **made_from,
        "num_samples": totals[0],
        "num_images": totals[1],
        "num_branched": num_branched,
        "num_usable": totals[0] - num_bad,
        "ignored": _by_count(sum(ignored, Counter())),
        "ignored_by_source": [_by_count(own) for own in ignored],
        "records": per_file[:, 0].tolist(),
        "usable": hashlib.sha256(np.asarray(usable).tobytes()).hexdigest(),
        "content": digest([file["digest"] for file in made_from["files"]]),
    }
    (begun / "index.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    files.close()
    for path in parts:
        path.unlink()
    (begun / "plan.json").unlink()


def _by_count(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
