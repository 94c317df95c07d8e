"""Balance of packs over context parallel ranks: counted row by row, and what `stats` says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from dattn_mcore.config.load import from_dict
from dattn_mcore.data.__main__ import main
from dattn_mcore.data.context_balance import (
    KINDS,
    PackLayout,
    context_balance,
    context_lines,
    rank_loads,
)
from dattn_mcore.layers.context import own_text_rows, share_of
from dattn_mcore.layers.layout import build_seq_params

TILE = 4
PACK = PackLayout(
    (
        ((False, 5), (True, 3 * TILE), (False, 40)),
        ((False, 17),),
        ((True, TILE), (False, 9), (True, 2 * TILE), (False, 30)),
    )
)


def by_row(pack: PackLayout, ranks: int) -> np.ndarray:
    """Pairs of every text row with the text and the visual rows before it, by who computes them."""
    params = build_seq_params(pack.layouts, t2v_position="none", multiple=8 * ranks)
    owner = np.full(params.num_text, -1)
    for rank in range(ranks):
        context = share_of(params, rank, ranks).context
        assert context is not None
        owner[own_text_rows(context, rank).numpy()] = rank
    loads = np.zeros((len(KINDS), ranks), dtype=int)
    text = visual = 0
    for layout in pack.layouts:
        first_text, seen = text, []
        for is_visual, rows in layout:
            for _ in range(rows):
                if is_visual:
                    seen.append(visual // (params.num_visual // ranks))
                    loads[0, seen[-1]] += 1
                    visual += 1
                    continue
                loads[2, owner[text]] += text - first_text + 1
                for rank in seen:
                    loads[3, rank] += 1
                text += 1
    tiles = visual // TILE
    for rank in range(ranks):
        loads[1, rank] = (rank + 1) * tiles // ranks - rank * tiles // ranks
    return loads


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_loads_are_those_of_every_row(ranks: int) -> None:
    found = rank_loads(
        PACK, ranks=ranks, rows_per_tile=TILE, multiple=8 * ranks, t2v_position="none"
    )
    assert found.tolist() == by_row(PACK, ranks).tolist()


def test_shared_images_are_counted_once() -> None:
    layout = ((True, 4 * TILE), (False, 8))
    shared = PackLayout((layout, layout), (0, 0))
    found = rank_loads(shared, ranks=2, rows_per_tile=TILE, multiple=2, t2v_position="none")
    assert found[0].tolist() == [2 * TILE] * 2 and found[1].tolist() == [2, 2]
    assert found[3].tolist() == [2 * 8 * 2 * TILE] * 2  # both samples see the rows of each rank


def config_of(cp: int):
    vision = {"image_size": 56, "patch_size": 28}
    return from_dict({"parallel": {"cp": cp}, "model": {"vision": vision}})


def pack_of(tiles: int) -> PackLayout:
    return PackLayout((((True, tiles * TILE), (False, 64)),))


def test_a_size_that_leaves_ranks_without_a_tile_is_named() -> None:
    packs = [pack_of(2), pack_of(2), pack_of(3), PackLayout((((False, 64),),))]
    balance = context_balance(packs, config_of(4))
    assert balance.tiles == (2, 2, 3, 0) and balance.without_tile == 1.0
    assert context_lines(balance)[-1] == (
        "parallel.cp=4 leaves a rank without a tile in 100% of packs with images; use "
        "parallel.cp=2 at most, or raise data.visual_budget"
    )
    fine = context_balance(packs, config_of(2))
    assert context_lines(fine)[-1].startswith("parallel.cp above 2 leaves a rank without a tile")
    # Two ranks have one tile each of two, and one and two of three.
    assert fine.heaviest["tower tiles"] == (1.0, 1.0, pytest.approx(2 / 1.5))


def test_packs_without_images_have_text_alone() -> None:
    lines = context_lines(context_balance([pack_of(0)], config_of(2)))
    assert len(lines) == 1 and "causal pairs of text: 1." in lines[0]


def test_stats_print_the_balance(
    toy_data: Path,
    toy_model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = tmp_path / "stats.html"
    settings = [
        f"data.annotations={toy_data / 'toy.json'}",
        f"data.image_folder={toy_data / 'images'}",
        f"data.tokenizer={toy_model}",
        f"data.index_dir={tmp_path / 'index'}",
        "data.template=mistral",
        "data.prepare=none",
        "model.vision.image_size=56",
        "model.vision.patch_size=14",
        "data.text_budget=160",
        "data.visual_budget=64",
        "train.global_batch_size=12",
        "data.image_backend=pillow",
        "parallel.cp=2",
    ]
    with caplog.at_level("INFO"):
        assert main(["stats", "--output", str(page), "--workers", "0", *settings]) == 0
    said = caplog.text + capsys.readouterr().out
    for kind in KINDS:
        assert f"heaviest of 2 context parallel ranks over the mean, {kind}: 1." in said
    assert "leaves a rank without a tile" in said
    text = page.read_text()
    cells = re.search(r'<table id="context">(.*?)</table>', text, re.S)
    assert cells is not None and all(kind in cells[1] for kind in KINDS)
