"""Three files know the device: no other names the vendor's libraries."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {
    "dattn_mcore/parallel/platform.py",
    "dattn_mcore/parallel/gpus.py",  # which of them PyTorch can use
    "dattn_mcore/parallel/on_cpu.py",  # what stands in their place
    "dattn_mcore/parallel/gpu_machine.py",  # what a machine has; it chooses nothing
    "tests/unit/test_one_device_file.py",
    # It stands in for the device, for a package that asks for one.
    "tests/te/compiled_module.py",
    # They sort packages by their names, some of which hold the library's.
    "tools/update_constraints.py",
    "tests/unit/test_constraints.py",
}
SUFFIXES = {".py", ".yaml", ".yml", ".sh", ".sbatch", ".cfg", ".toml"}
NAMES = {"Makefile", "run"}
FOLDERS = ("dattn_mcore", "tools", "configs", "examples", "tests", "benchmarks", ".ci")
WORDS = re.compile(r"cuda|(?<!Asy)nccl|gloo", re.IGNORECASE)  # AsyncClient is a name of httpx
PACKAGES = re.compile(r"nvidia-dali-cuda\d+")  # a package's name in pyproject.toml


def _files():
    yield from (path for path in ROOT.iterdir() if path.is_file())
    for folder in FOLDERS:
        yield from (path for path in (ROOT / folder).rglob("*") if path.is_file())


def test_only_the_platform_file_names_device_libraries():
    found, scanned = [], 0
    for path in _files():
        name = path.relative_to(ROOT).as_posix()
        if name in ALLOWED or not (path.suffix in SUFFIXES or path.name in NAMES):
            continue
        scanned += 1
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if WORDS.search(PACKAGES.sub("", line)):
                found.append(f"{name}:{number}: {line.strip()}")
    assert scanned > 50
    assert not found, "\n".join(found)
