"""Extras that are installed and whose import raises anything: one line with the reason."""

import json
import sys

import pytest
from PIL import Image

from dattn_mcore.data.images import make_decoder
from dattn_mcore.data.sources.parquet import ParquetFile
from dattn_mcore.errors import ConfigError
from dattn_mcore.evaluation.adapter import SETTINGS, WEIGHTS, check_adapter_folder
from dattn_mcore.evaluation.benchmarks.mmbench import MmBench
from dattn_mcore.evaluation.benchmarks.mmstar import MmStar
from dattn_mcore.hf import image_rules_dattn
from dattn_mcore.parallel import platform
from dattn_mcore.training.sinks.build import check_trackers
from tests.unit.parallel.test_packages import broken
from tests.unit.training.test_sinks import config_of

WHY = "which cannot be imported (no such library)"


@pytest.fixture
def without(tmp_path, monkeypatch, fresh_imports):
    """Breaks a package for a test."""

    def install(package, kind="RuntimeError"):
        broken(tmp_path / "site", package, kind)
        for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(tmp_path / "site")

    yield install
    for name in [n for n in sys.modules if n.startswith("nvidia")]:
        monkeypatch.delitem(sys.modules, name)


def one_line(call, message):
    with pytest.raises(ConfigError) as caught:
        call()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_peft(without, tmp_path):
    without("peft")
    (tmp_path / SETTINGS).write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / WEIGHTS).touch()
    one_line(lambda: check_adapter_folder(tmp_path), f"--adapter needs the package peft, {WHY}")


def test_pyarrow(without, tmp_path):
    without("pyarrow", "OSError")
    (tmp_path / "mmstar").mkdir()
    one_line(lambda: ParquetFile(tmp_path / "a.parquet", ""), "pyarrow cannot be imported (no such")
    one_line(lambda: MmStar(tmp_path).table, f"needs pyarrow, {WHY}")


def test_openpyxl(without, tmp_path, monkeypatch):
    without("openpyxl", "AttributeError")
    monkeypatch.setattr(MmBench, "rows", [])
    benchmark = MmBench(tmp_path)
    one_line(lambda: benchmark.submit([], tmp_path, "m"), f"writing xlsx needs openpyxl, {WHY}")


@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "tensorboard"])
def test_trackers(without, tmp_path, tracker):
    without(tracker, "TypeError")
    config = config_of(tmp_path, **{tracker: True})
    one_line(
        lambda: check_trackers(config), f"log.{tracker}=true needs the package {tracker}, {WHY}"
    )


def test_dali(without):
    without("nvidia")
    decoder = make_decoder("auto", 1)
    assert decoder.name == "pillow"
    decoder.close()
    one_line(lambda: make_decoder("dali", 1), "data.image_backend: 'dali' cannot be imported (no")


def test_apex(without):
    without(platform.ADDS_GRADIENTS, "ImportError")
    assert not platform.apex_adds_gradients()


def test_pillow_heif(without, tmp_path):
    without("pillow_heif", "OSError")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    image_rules_dattn.heif_is_readable.cache_clear()
    assert not image_rules_dattn.heif_is_readable()
    assert image_rules_dattn.open_image(str(tmp_path / "a.png")).size == (4, 4)
    image_rules_dattn.heif_is_readable.cache_clear()
