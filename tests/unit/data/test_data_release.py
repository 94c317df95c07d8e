"""The D-Attn release's own layout: its annotation files and image folders, used as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from dattn_mcore.config.load import load_config
from dattn_mcore.data.__main__ import main
from dattn_mcore.data.pipeline import DataPipeline
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from dattn_mcore.types import IGNORED_LABEL, visual_units
from tests.unit.data.golden import picture

ROOT = Path(__file__).resolve().parents[3]
# Folders below data/train, with a file name as each source has them, and the pixels of an image.
IMAGES = {
    "llava/llava_pretrain/images/00453/004539375.jpg": (336, 250),
    "coco/train2017/000000000009.jpg": (640, 480),
    "sam/images/sa_1.jpg": (1500, 1000),
    "gqa/images/2354786.jpg": (500, 375),
    "ocr_vqa/images/0006496950.jpg": (300, 475),
    "textvqa/train_images/0054c91397f2fe05.jpg": (683, 1024),
    "vg/VG_100K/2.jpg": (800, 600),
    "vg/VG_100K_2/713545.jpg": (500, 333),
    "share_textvqa/images/0004c9478eeda995.jpg": (768, 1024),
    "web-celebrity/images/Tom_Hanks.jpg": (220, 330),
    "web-landmark/images/Eiffel Tower, Paris.jpg": (1024, 683),
    "wikiart/images/vincent-van-gogh_the-starry-night-1889(1).jpg": (1000, 800),
}
BLIP = "llava/llava_pretrain/images/"


@pytest.fixture
def release(tmp_path: Path, toy_model: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A made-up copy of the release in the working directory; settings that make it small."""
    for name, size in IMAGES.items():
        (tmp_path / "data/train" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(*size).save(tmp_path / "data/train" / name, quality=80)

    def record(name: str, image: str | None, *turns: str) -> dict[str, object]:
        said = [
            {"from": ("human", "gpt")[number % 2], "value": text}
            for number, text in enumerate(turns)
        ]
        return {"id": name, **({"image": image} if image else {}), "conversations": said}

    caption = "Give a brief description of the image.\n<image>"
    blip = [record(f"b{n}", f"00453/{n}.jpg", caption, "a digit 7") for n in range(8)]
    for number in range(8):
        picture(200 + number, 180).save(tmp_path / "data/train" / BLIP / f"00453/{number}.jpg")
    long = [record(name, name, "<image>\nWhat is it?", "7 " * 40) for name in IMAGES]
    talk = [
        record(name, name, "<image>\nWhich digit?", "7", "In which cell?", "top-left")
        for name in IMAGES
    ]
    talk += [record(f"t{number}", None, "Which digit?", "7") for number in range(3)]
    files = {"blip_laion_cc_sbu_558k": blip, "shrcap_filtered": long, "llava_gpt4v_filtered": talk}
    for name, records in files.items():
        (tmp_path / f"data/{name}.json").write_text(json.dumps(records))
    monkeypatch.chdir(tmp_path)
    settings = [f"data.tokenizer={toy_model}", "train.global_batch_size=8"]
    return [*settings, "data.step_packs_multiple=null", "data.prefetch=1"]


@pytest.mark.parametrize(
    ("stage", "samples", "template"), [("aln", 8, "plain"), ("pt", 12, "plain"), ("it", 15, None)]
)
@pytest.mark.parametrize("llm", ["mistral", "gemma"])
def test_a_stage_reads_its_file_and_folders(
    release: list[str],
    toy_tokenizer: SentencePieceTokenizer,
    llm: str,
    stage: str,
    samples: int,
    template: str | None,
) -> None:
    path = ROOT / "configs" / f"{llm}_{stage}.yaml"
    assert main(["check", "--config", str(path), "--decode", "--workers", "0", *release]) == 0
    config = load_config(path, release)
    assert config.data.template == (template or llm)
    pipeline = DataPipeline(
        config, toy_tokenizer, dp_rank=0, dp_size=1, microbatch_multiple=1, needs_pixels=True
    )
    seen: set[str] = set()
    for step in range(-(-samples // 8)):
        batch = pipeline.global_batch(step)
        assert not batch.failures and not batch.skipped
        seen |= set(batch.sample_ids)
        for micro in batch.microbatches:
            # A step over the end of an epoch may have a sample twice, which shares its images.
            visual = sum(visual_units(micro.layouts, micro.images_of))
            assert visual == 729 * micro.num_tiles
            assert (micro.labels != IGNORED_LABEL).any()
            if micro.num_tiles:
                assert micro.tiles is not None and micro.tiles.shape[1:] == (3, 384, 384)
                assert float(micro.tiles.float().std()) > 20  # pictures, no grey stand-ins
    pipeline.close()
    assert len(pipeline.index) == len(seen) == samples
    if stage != "aln":
        assert set(IMAGES) <= {pipeline.index.name(image) for image in pipeline.index.images}


def test_what_is_missing_of_the_release_is_named(release: list[str], tmp_path: Path) -> None:
    """A folder that was not downloaded, and OCR-VQA's images under their old extension."""
    (tmp_path / "data/train/wikiart").rename(tmp_path / "elsewhere")
    gif = tmp_path / "data/train/ocr_vqa/images/0006496950"
    with Image.open(gif.with_suffix(".jpg")) as image:
        image.save(gif.with_suffix(".gif"))
    gif.with_suffix(".jpg").unlink()
    config = str(ROOT / "configs/gemma_it.yaml")
    options = ["--workers", "0", "--report", "found.jsonl"]
    assert main(["check", "--config", config, *options, *release]) == 1
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    reasons = {line["path"]: line["reason"] for line in lines}
    assert len(lines) == 2
    gone = "wikiart/images/vincent-van-gogh_the-starry-night-1889(1).jpg"
    assert f"'{gone}' does not exist below" in reasons[gone]
    assert reasons["ocr_vqa/images/0006496950.jpg"].endswith(
        "'0006496950.gif' is there, with another extension"
    )
