"""One file has the pixels of training, whichever way it comes to an exported processor."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dattn_mcore.data.image_rules import rules_of
from dattn_mcore.data.tiles import POLICIES
from dattn_mcore.evaluation.images import Picture, rules_of_processor
from dattn_mcore.hf import DattnProcessor, register
from dattn_mcore.hf.image_rules_dattn import OLD_RULES
from tests.unit.convert.convert_helpers import make_checkpoint, make_tokenizer, small_config
from tests.unit.data.folder_loader import FolderLoader
from tests.unit.data.golden import BACKENDS
from tests.unit.data.test_data_orientation import LAY_DOWN, tagged
from tools.checkpoint_convert import mcore_to_hf
from tools.checkpoint_convert.hf_to_mcore import image_settings

RULES = {
    "as people see it": {},
    "as LLaVA reads it": {
        "apply_orientation": False,
        "transparency": "drop",
        "anyres_ties": "first",
    },
}
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth pictures, which both ways of resizing treat alike: eight ways to lie, transparent."""
    folder = tmp_path_factory.mktemp("rules")
    y, x = np.mgrid[0:30, 0:90]
    channels = [x * 255 // 89, y * 255 // 29, (x + y) * 2, 255 - x * 255 // 89]
    clear = Image.fromarray(np.stack(channels, -1).astype(np.uint8))
    for orientation, lay in LAY_DOWN.items():
        exif = tagged(orientation)
        lay(clear.convert("RGB")).save(folder / f"{orientation}.jpg", quality=95, exif=exif)
        lay(clear).save(folder / f"{orientation}.png", exif=exif)
    clear.convert("P").save(folder / "palette.png", transparency=0)
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Where a server of this machine gives the files."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def export(folder: Path, policy: str, **rules: Any) -> tuple[Any, Any]:
    """The settings of a run and the processor of its export."""
    config = small_config(make_tokenizer(folder))
    data = replace(config.data, image_policy=policy, anyres_grids=GRIDS, **rules)
    make_checkpoint(folder / "mcore", replace(config, data=data))
    mcore_to_hf.convert(folder / "mcore", folder / "hf")
    register()
    return data, DattnProcessor.from_pretrained(folder / "hf")


def trained_on(folder: Path, names: list[str], data: Any, backend: str) -> list[Tensor]:
    """Tiles of each file as training makes them."""
    loader = FolderLoader(
        folder,
        size=28,
        policy=data.image_policy,
        grids=GRIDS,
        backend=backend,
        rules=rules_of(data),
    )
    tiles = [loader.load([(name, name)]) for name in names]
    loader.close()
    return tiles


def chat(**image: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [{"type": "image", **image}, {"type": "text", "text": "?"}]}
    ]


def ways(processor: Any, folder: Path, address: str, name: str) -> dict[str, Any]:
    """What the processor makes of a file, by the way it comes."""
    path = folder / name
    encoded = base64.b64encode(path.read_bytes()).decode()
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    rules = rules_of_processor(processor.image_processor)
    given = {
        "opened": Image.open(path),
        "path": str(path),
        "URL": f"{address}/{name}",
        "base64": encoded,
        "data URL": f"data:image/png;base64,{encoded}",
        "evaluation": Picture(name, path).open("q", rules),
        "evaluation, bytes": Picture(name, path.read_bytes()).open("q", rules),
    }
    found = {
        way: processor.image_processor([image], return_tensors="pt") for way, image in given.items()
    }
    text = "<image>\n?"
    found["processor, path"] = processor(images=[str(path)], text=[text], return_tensors="pt")
    found["chat, path"] = processor.apply_chat_template(chat(path=str(path)), **options)
    found["chat, URL"] = processor.apply_chat_template(chat(url=f"{address}/{name}"), **options)
    found["chat, opened"] = processor.apply_chat_template(chat(image=Image.open(path)), **options)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("policy", ["stretch", "anyres_stretch"])
def test_every_way_gives_the_pixels_of_training(
    folder: Path, address: str, tmp_path: Path, policy: str, rules: str, backend: str
) -> None:
    data, processor = export(tmp_path, policy, **RULES[rules])
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".jpg", ".png"))
    assert len(names) == 17
    for name, tiles in zip(names, trained_on(folder, names, data, backend), strict=True):
        for way, found in ways(processor, folder, address, name).items():
            pixels = (found["pixel_values"] * 0.5 + 0.5) * 255
            assert pixels.shape == tiles.shape, f"{name} by {way}"
            # Two ways of resizing.
            assert (pixels - tiles).abs().max() <= 2.01, f"{name} by {way}"


@pytest.mark.parametrize("policy", POLICIES)
def test_an_export_keeps_the_rules_and_gives_them_back(tmp_path: Path, policy: str) -> None:
    given = RULES["as LLaVA reads it"]
    _, processor = export(tmp_path, policy, **given)
    settings = json.loads((tmp_path / "hf/processor_config.json").read_text())["image_processor"]
    assert settings["apply_orientation"] is False and settings["transparency"] == "drop"
    assert settings["anyres_ties"] == "first" and settings["image_policy"] == policy
    back = image_settings(tmp_path / "hf")
    assert {name: getattr(back, name) for name in given} == given
    assert back.image_policy == policy
    assert rules_of_processor(processor.image_processor).transparency == "drop"


def test_an_export_without_rules_means_the_old_ones(tmp_path: Path) -> None:
    _, processor = export(tmp_path, "anyres_stretch")
    assert rules_of_processor(processor.image_processor).apply_orientation
    file = tmp_path / "hf/processor_config.json"
    settings = json.loads(file.read_text())
    for name in ("apply_orientation", "transparency", "anyres_ties"):
        del settings["image_processor"][name]
    file.write_text(json.dumps(settings))
    back = image_settings(tmp_path / "hf")
    assert (back.apply_orientation, back.transparency, back.anyres_ties) == (
        False,
        "white",
        "first",
    )
    old = DattnProcessor.from_pretrained(tmp_path / "hf").image_processor
    assert rules_of_processor(old) == OLD_RULES
    wide = Image.fromarray(np.zeros((9, 27, 3), np.uint8))
    assert old([wide], return_tensors="pt")["image_grids"].tolist() == [[1, 2]]
    assert processor.image_processor([wide], return_tensors="pt")["image_grids"].tolist() == [
        [2, 1]
    ]


def test_rules_can_be_given_with_a_call_and_unknown_ones_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    _, processor = export(tmp_path, "stretch")
    image = str(folder / "6.jpg")
    make = partial(processor.image_processor, return_tensors="pt")
    turned, lying = make([image]), make([image], apply_orientation=False)
    assert not torch.equal(turned["pixel_values"], lying["pixel_values"])
    with pytest.raises(ValueError, match="transparency is 'black'; it must be one of white, drop"):
        make([image], transparency="black")
    for option in ({"do_resize": False}, {"crop_size": {"height": 28, "width": 28}}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} cannot be given"):
            make([image], **option)
    with pytest.raises(ValueError, match="an image must be a path, a URL or base64 text"):
        make(["no/such/file.jpg"])
