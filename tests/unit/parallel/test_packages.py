"""Optional packages that are installed and broken: the reason is kept, and they count as absent."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dattn_mcore.parallel import packages
from dattn_mcore.parallel.packages import import_problem

ROOT = Path(__file__).resolve().parents[3]


def broken(folder, package, kind, message="no such library\nof many lines"):
    """A package whose import raises, after a part of it has been imported."""
    (folder / package).mkdir(parents=True)
    (folder / package / "part.py").write_text("")
    lines = f"from {package} import part\nraise {kind}({message!r})\n"
    (folder / package / "__init__.py").write_text(lines)


@pytest.mark.parametrize("kind", ["OSError", "RuntimeError", "AssertionError", "ImportError"])
def test_a_broken_package_looks_absent_and_its_reason_is_kept(kind, tmp_path, monkeypatch):
    package = f"broken_by_{kind.lower()}"
    broken(tmp_path, package, kind)
    monkeypatch.syspath_prepend(tmp_path)
    packages.hide_broken([f"{package}.part", "a_package_that_is_absent", "json"])
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(package)
    assert importlib.util.find_spec(package) is None
    assert f"{package}.part" not in sys.modules
    assert import_problem(package) == "cannot be imported (no such library)"
    assert import_problem(f"{package}.other") == "cannot be imported (no such library)"
    assert import_problem("a_package_that_is_absent") == "is not installed"
    assert import_problem("json") is None and importlib.import_module("json").dumps(1) == "1"


def test_a_package_that_exits_ends_no_process(tmp_path, monkeypatch):
    (tmp_path / "broken_by_exit.py").write_text("import sys\nsys.exit('no GPU here')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_problem("broken_by_exit") == "cannot be imported (it exits with no GPU here)"


# Each as an entry point does it: Megatron-Core dies of the first while it is imported.
IMPORTS = """
from dattn_mcore.parallel import entry, platform
entry.prepare_imports("cpu")
import dattn_mcore.training.loop
from dattn_mcore.config.load import from_dict
from dattn_mcore.training.implementation import choose_implementation, transformer_engine_missing
from dattn_mcore.parallel.packages import import_problem
print(transformer_engine_missing())
print(import_problem("flash_attn.flash_attn_interface"), platform.apex_adds_gradients())
import torch
from dattn_mcore.training import implementation
implementation.current_device = lambda: torch.device("meta")  # a GPU: not the CPU
print(choose_implementation(from_dict({"train": {"precision": "bf16"}})))
"""


def environment(folder):
    path = os.pathsep.join([str(folder), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_megatron_core_is_imported_beside_broken_packages(tmp_path):
    for name in ("transformer_engine", "flash_attn", "apex", "flashinfer", "deep_ep"):
        broken(tmp_path, name, "OSError", f"no library of {name}")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORTS],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(tmp_path),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-3:] == [
        "it cannot be imported (no library of transformer_engine)",
        "cannot be imported (no library of flash_attn) False",
        "local",
    ]
