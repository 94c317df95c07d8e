"""Images on a GPU that has no room for them, or whose decoder does not work; no GPU is needed."""

import io
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from dattn_mcore.data import decode_dali, images
from dattn_mcore.data.decode_dali import DaliDecoder
from dattn_mcore.data.decode_pillow import decode_with_pillow
from dattn_mcore.data.image_files import ImageFile, read_image_file
from dattn_mcore.errors import RankError
from tests.unit.data.folder_loader import FolderLoader
from tests.unit.data.golden import picture

GPU = "CU" + "DA"
MEMORY = torch.OutOfMemoryError(f"{GPU} out of memory. Tried to allocate 12.00 GiB.")
WEIGHTS = RuntimeError(
    "Provided interpolation parameters can not be handled with current algorithm implementation. "
    "Please reduce the scale factor. Too much shared memory required: 57460 vs 49152"
)
SICK = RuntimeError(f"{GPU} error: an illegal memory access was encountered\nCompile with ...")


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, and whose resize fails there."""

    error: Exception

    @property
    def device(self):
        return torch.device("meta")

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is functional.interpolate:
            raise cls.error
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture
def loader(tmp_path, monkeypatch):
    """Loads three files; the second one is decoded on a GPU that fails with an error."""
    for name, size in (("a.png", (50, 40)), ("b.png", (60, 40)), ("c.png", (70, 40))):
        picture(*size).save(tmp_path / name)
    made = FolderLoader(tmp_path, size=56, backend="pillow")
    decode = made.inner._decoder.decode

    def start(error):
        OnGpu.error = error
        monkeypatch.setattr(
            made.inner._decoder,
            "decode",
            lambda files: [
                image.as_subclass(OnGpu) if image.shape[2] == 60 else image
                for image in decode(files)
            ],
        )
        return made

    monkeypatch.setattr(images, "_said", set())
    yield start
    made.close()


@pytest.mark.parametrize("policy", ["stretch", "crop"])
@pytest.mark.parametrize("error", [MEMORY, WEIGHTS], ids=["memory", "weights"])
def test_what_a_gpu_has_no_room_for_is_resized_on_the_cpu(loader, error, policy, caplog):
    wanted = [(name, f"{name}.png") for name in "abc"] * 2
    started = loader(ValueError("never asked"))
    started.inner._policy = policy
    requests = started.requests(wanted)
    started.inner._decoder.decode, gpu = decode_all, started.inner._decoder.decode
    expected, _ = started.inner.load(requests)
    started.inner._decoder.decode = gpu
    OnGpu.error = error
    with caplog.at_level(logging.WARNING):
        tiles, failures = started.inner.load(requests)
    assert failures == [] and torch.equal(tiles, expected)
    (line,) = caplog.messages
    assert "'b.png' does not fit the GPU's resize (" in line and "resized on the CPU" in line


def decode_all(files: list[ImageFile]) -> list[torch.Tensor]:
    return [decode_with_pillow(file) for file in files]


def test_a_gpu_that_fails_ends_the_run_in_one_line(loader):
    started = loader(SICK)
    with pytest.raises(RankError, match="^the GPU fails while it resizes an image, .*'b.png'") as e:
        started.load([(name, f"{name}.png") for name in "abc"])
    assert "an illegal memory access" in str(e.value) and "\n" not in str(e.value)


CUT = 99  # bytes of a file that neither decodes


class Pipeline:
    """DALI's, by Pillow; the device in `broken` decodes nothing."""

    built: list[str] = []
    broken: tuple[str, ...] = ()

    def __init__(self, threads, device, device_id):
        self.device = device
        Pipeline.built.append(device)
        if device in self.broken:
            raise RuntimeError("nvJPEG error 6\nof many lines")

    def feed_input(self, name, encoded):
        self.encoded = encoded

    def run(self):
        opened = [Image.open(io.BytesIO(data.tobytes())) for data in self.encoded]
        return ([np.array(image.convert("RGB")) for image in opened],)


@pytest.fixture
def dali(monkeypatch):
    def start(*broken):
        monkeypatch.setattr(decode_dali, "_build_pipeline", Pipeline)
        monkeypatch.setattr(Pipeline, "broken", broken)
        monkeypatch.setattr(Pipeline, "built", [])
        return DaliDecoder(1, "gpu", 0)

    return start


@pytest.fixture
def files(tmp_path: Path):
    found = []
    for number in range(12):
        picture(40 + number, 30).save(tmp_path / f"{number}.png")
        found.append(read_image_file(tmp_path, f"{number}.png", str(number), 10**6))
    return found


@pytest.mark.parametrize(
    ("broken", "given_up"), [(("gpu",), ["GPU"]), (("gpu", "cpu"), ["GPU", "CPU"])]
)
def test_a_decoder_that_refuses_all_is_given_up_and_said_once(
    dali, files, caplog, broken, given_up
):
    decoder = dali(*broken)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            for file, image in zip(files, decoder.decode(files), strict=True):
                assert torch.equal(image, decode_with_pillow(file))
    decoder.close()
    said = [line for line in caplog.messages if "is given up" in line]
    assert [line.split("decoder on the ")[1][:3] for line in said] == given_up
    assert "refuses 4 good images in a row (nvJPEG error 6); it is given up" in said[0]
    assert ("by Pillow" in said[-1]) == (len(broken) == 2)
    assert len(caplog.messages) == len(said) * 5  # and four images each
    assert Pipeline.built.count("gpu") == 5  # a batch, and four alone


def test_bad_images_in_a_row_are_not_the_decoders(dali, files, monkeypatch, caplog):
    decoder = dali()
    run = decoder._run

    def refuse(batch):
        if any(len(image.data) == CUT for image in batch):
            raise RuntimeError("damaged")
        return run(batch)

    monkeypatch.setattr(decoder, "_run", refuse)
    bad = [replace(file, data=file.data[:CUT]) for file in files[1:9]]
    decoder.decode([files[0], *bad, *files[9:]])
    decoder.close()
    assert not [line for line in caplog.messages if "is given up" in line]
