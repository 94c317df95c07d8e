"""The locked versions agree with the metadata, and an installation uses them."""

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from dattn_mcore.hf.configuration_dattn import TESTED_TRANSFORMERS
from tools import install, update_constraints

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
FIRST = (ROOT / "constraints.txt").read_text(encoding="utf-8")
SECOND = (ROOT / "constraints-torch.txt").read_text(encoding="utf-8")
PYTHONS = ("3.10", "3.11", "3.12")
BUILT_ON_GPU_MACHINES = ("te", "flash")  # compiled against the PyTorch that is there

# What PyTorch's older releases ask for, besides CUDA's libraries.
OLDER_TORCH = {
    "2.11.0": ["filelock", "typing-extensions>=4.10.0", "setuptools<82", "sympy>=1.13.3"]
    + ["networkx>=2.5.1", "jinja2", "fsspec>=0.8.5"],
    "2.12.1+cu126": ["filelock", "typing-extensions>=4.10.0", "setuptools<82", "sympy>=1.13.3"]
    + ["networkx>=2.5.1", "jinja2", "fsspec>=0.8.5"],
}


def lists() -> dict[str, list[str]]:
    """Requirements by the name of their list in pyproject.toml (Python 3.10 reads no TOML)."""
    blocks = re.findall(r"^([\w-]+) = \[(.*?)\](?=\n|  #)", PROJECT, re.MULTILINE | re.DOTALL)
    names = [
        "requires",
        "dependencies",
        "dali",
        "parquet",
        "heif",
        "video",
        "te",
        "flash",
        "triton",
        "eval",
        "dev",
    ]
    found = {name: re.findall(r'"([^"]+)"', block) for name, block in blocks if name in names}
    assert list(found) == names
    return found


def pins(text: str) -> list[Requirement]:
    """The lines of a constraints file."""
    return [Requirement(line) for line in text.splitlines() if not line.startswith("#")]


def environment(python: str, machine: str) -> dict[str, str]:
    """What markers are compared with."""
    return {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "platform_machine": machine,
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_python_implementation": "CPython",
    }


def locked(python: str, machine: str, text: str = FIRST + SECOND) -> dict[str, Version]:
    """The versions for a Python and a processor; refuses two for one package."""
    found: dict[str, Version] = {}
    for pin in pins(text):
        if pin.marker is None or pin.marker.evaluate(environment(python, machine)):
            (only,) = pin.specifier
            assert canonicalize_name(pin.name) not in found, pin.name
            found[canonicalize_name(pin.name)] = Version(only.version)
    return found


def test_exports_record_the_range_that_is_locked_and_allowed():
    """A bound that was raised, or a lock that moved, is a release that exports must name."""
    oldest, newest = map(Version, TESTED_TRANSFORMERS)
    (allowed,) = [t for t in lists()["dependencies"] if t.startswith("transformers")]
    specifiers = Requirement(allowed).specifier
    assert {Version(s.version) for s in specifiers if s.operator == ">="} == {oldest}
    assert locked("3.12", "x86_64")["transformers"] == newest
    assert newest in specifiers


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_has_one_version_within_its_range(python, machine):
    versions = locked(python, machine)
    asked = 0
    for name, requirements in lists().items():
        if name in BUILT_ON_GPU_MACHINES:
            continue
        for requirement in map(Requirement, requirements):
            marker = requirement.marker
            if marker is None or marker.evaluate(environment(python, machine)):
                version = versions[canonicalize_name(requirement.name)]
                assert version in requirement.specifier, (name, str(requirement), str(version))
                asked += 1
    assert asked > 35


def test_a_constraints_file_holds_versions_and_nothing_else():
    for pin in pins(FIRST + SECOND):
        (only,) = pin.specifier
        assert only.operator == "==" and "*" not in only.version, str(pin)
        assert pin.url is None and not pin.extras, str(pin)
    for text in (FIRST, SECOND):
        assert "://" not in text and "--" not in text and "@" not in text
    own = [pin.name for pin in pins(SECOND)]
    assert {"torch", "triton"} <= set(own)
    assert all(re.match("torch$|triton$|(nvidia|cuda)-", name) for name in own)
    assert not set(own) & {pin.name for pin in pins(FIRST)}
    assert "nvidia-dali-cuda120" in {
        pin.name for pin in pins(FIRST)
    }  # DALI's are no part of PyTorch


def test_every_range_has_two_ends():
    for requirement in (Requirement(text) for texts in lists().values() for text in texts):
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators in ({">=", "<"}, {"=="}), str(requirement)


def test_every_python_that_is_allowed_has_versions():
    (allowed,) = re.findall(r'^requires-python = "(.+)"', PROJECT, re.MULTILINE)
    assert [f"3.{n}" for n in range(6, 20) if f"3.{n}" in SpecifierSet(allowed)] == list(PYTHONS)
    assert PYTHONS[0] == update_constraints.OLDEST_PYTHON
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "(3, 10) <= sys.version_info < (3, 13)" in makefile
    assert "python_version >= '3.10' and python_version < '3.13'" in PROJECT


def test_what_builds_the_package_is_what_is_installed():
    found = lists()
    assert [text for text in found["dev"] if text.startswith("setuptools")] == found["requires"]


@pytest.mark.parametrize("release", OLDER_TORCH)
@pytest.mark.parametrize("python", PYTHONS)
def test_an_older_torch_goes_with_the_other_versions(python, release):
    versions = locked(python, "x86_64", FIRST)
    assert "torch" not in versions
    for requirement in map(Requirement, OLDER_TORCH[release]):
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier


def put_distribution(folder: Path, name: str, version: str, requires: list[str]) -> None:
    """Files by which pip and Python take a distribution for installed."""
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(metadata)
    (info / "INSTALLER").write_text("pip\n")
    (info / "RECORD").write_text("")


def put_wheel(folder: Path, name: str, version: str) -> None:
    """A wheel with nothing in it."""
    info = f"{name}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def empty(tmp_path):
    """A new environment with pip; calls Python in it."""
    venv.create(tmp_path / "env", with_pip=True)

    def run(*arguments, **variables):
        outside = {key: os.environ[key] for key in os.environ if not key.startswith("PYTHON")}
        return subprocess.run(
            [tmp_path / "env/bin/python", *arguments],
            cwd=ROOT,
            env={**outside, **variables},
            capture_output=True,
            text=True,
        )

    (run.packages,) = (tmp_path / "env/lib").glob("python*/site-packages")
    run.record = tmp_path / "env" / install.TORCH_RECORD.name
    return run


STAYS = "from tools import install; print(install.torch_stays(install.installed('torch')))"


def test_a_torch_in_the_range_stays(empty, tmp_path):
    put_wheel(tmp_path / "wheels", "torch", "2.13.0")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels")}
    assert empty("-c", STAYS, **offline).stdout == "False\n"  # none is installed

    for release, requires in OLDER_TORCH.items():
        put_distribution(empty.packages, "torch", release, requires)
        stays = f"PyTorch {release} is installed already and stays\nTrue\n"
        assert empty("-c", STAYS, **offline).stdout == stays
        empty.record.write_text(f"{release}\n")  # came from constraints-torch.txt
        assert empty("-c", STAYS, **offline).stdout == "False\n"
        empty.record.write_text("2.13.0\n")  # has been exchanged since
        assert empty("-c", STAYS, **offline).stdout == stays
        empty.record.unlink()
        (empty.packages / f"torch-{release}.dist-info/METADATA").unlink()
        (empty.packages / f"torch-{release}.dist-info/RECORD").unlink()
        (empty.packages / f"torch-{release}.dist-info/INSTALLER").unlink()
        (empty.packages / f"torch-{release}.dist-info").rmdir()

    put_distribution(empty.packages, "torch", "2.10.0", [])
    assert empty("-c", STAYS, **offline).stdout == (
        f"PyTorch 2.10.0 is installed already and is replaced, {install.torch_range()} is needed\n"
        "False\n"
    )


def test_an_index_that_cannot_be_reached_is_one_line(empty):
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
    nowhere |= {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    done = empty("-m", "tools.install", **nowhere)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: the package index cannot be reached; check the network ")
    assert done.stderr.count("\n") == 1 and done.stderr.endswith("pip.log\n")


def test_versions_that_cannot_be_had_are_one_line(empty, tmp_path):
    put_wheel(tmp_path / "wheels", "setuptools", "80.0.0")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels")}
    done = empty("-m", "tools.install", **offline)
    assert done.returncode == 1 and done.stdout == ""
    assert re.match(r"error: pip failed: (Could not find a version|Cannot install)", done.stderr)
    assert "setuptools" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_installation_takes_the_locked_versions_and_leaves_an_older_torch(empty):
    """pip's own answer, with the index; nothing is installed."""
    put_distribution(empty.packages, "torch", "2.12.1", OLDER_TORCH["2.12.1+cu126"])
    done = empty("-m", "tools.install", "--dev", "--dry-run")
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == f"setuptools=={locked('3.11', 'x86_64')['setuptools']}" or "PyTorch" in first
    found = dict(line.split("==") for line in [first, *lines] if "==" in line)
    found = {str(canonicalize_name(name)): Version(version) for name, version in found.items()}
    assert found.pop("dattn-mcore")
    assert "torch" not in found and not any(name.startswith("cuda-") for name in found)
    unlocked = found.pop("triton")  # no PyTorch here asks for a certain one
    assert unlocked in Requirement(next(t for t in lists()["dev"] if "triton" in t)).specifier
    python = f"3.{sys.version_info.minor}"
    assert found == {
        name: version
        for name, version in locked(python, "x86_64", FIRST).items()
        if name in found or name == "transformers"
    }
    assert len(found) > 100


def test_the_resolver_s_conditions_that_always_hold_are_left_out():
    always = "python_full_version < '3.13' and "
    linux = "sys_platform == 'linux'"
    shorter = update_constraints.shorter
    assert shorter(f"a==1 ; {always}{linux}") == "a==1"
    assert shorter(f"a==1 ; {always}platform_machine == 'x86_64' and {linux}") == (
        "a==1 ; platform_machine == 'x86_64'"
    )
    assert shorter(f"a==1 ; python_full_version >= '3.11' and {always}{linux}") == (
        "a==1 ; python_full_version >= '3.11'"
    )
    assert shorter(f"a==1 ; python_full_version < '3.11' and {linux}") == (
        "a==1 ; python_full_version < '3.11'"
    )
