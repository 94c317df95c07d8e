"""Loads images of one folder as a test wants them: all, or the first one's error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dattn_mcore.data.image_files import check_folder, probe_image_file, read_bytes
from dattn_mcore.data.image_rules import DEFAULT_RULES
from dattn_mcore.data.images import ImageLoader, ImageRequest
from dattn_mcore.data.tiles import Grid, choose_tiling
from dattn_mcore.errors import DataError


class FolderLoader:
    """An ImageLoader over (annotation id, path below the folder)."""

    def __init__(self, folder: Path, *, max_pixels: int = 100_000_000, **options: Any) -> None:
        self.inner = ImageLoader(max_pixels=max_pixels, **options)
        self.folder, self.max_pixels, self.options = check_folder(folder), max_pixels, options

    @property
    def backend(self) -> str:
        return self.inner.backend

    def requests(self, items: Sequence[tuple[str, str]]) -> list[ImageRequest]:
        made = []
        for name, path in items:
            who = f"annotation {name!r}: image '{path}'"
            read = partial(read_bytes, self.folder, path, who, self.max_pixels)
            made.append(ImageRequest(who, read, *self._tiling(path)))
        return made

    def load(self, items: Sequence[tuple[str, str]], grids: Sequence[Grid] = ()) -> Tensor:
        requests = self.requests(items)
        if grids:  # other than the index would have
            requests = [replace(r, grid=g) for r, g in zip(requests, grids, strict=True)]
        tiles, failures = self.inner.load(requests)
        if failures:
            raise DataError(failures[0].reason)
        return tiles

    def close(self) -> None:
        self.inner.close()

    def _tiling(self, path: str) -> tuple[int, Grid]:
        policy = self.options.get("policy", "stretch")
        if not policy.startswith("anyres"):
            return 1, (0, 0)
        rules = self.options.get("rules", DEFAULT_RULES)
        header = probe_image_file(self.folder, path, self.max_pixels, rules=rules)
        tiling = choose_tiling(
            header.width,
            header.height,
            policy=policy,
            tile_size=self.options["size"],
            grids=self.options["grids"],
            ties=rules.anyres_ties,
        )
        return tiling.num_tiles, tiling.grid
