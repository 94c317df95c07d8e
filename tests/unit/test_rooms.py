"""A part of the package imports only from parts above it: no cycles, lazy imports included."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "dattn_mcore"
# A file or folder of the package may import from those before it.
ORDER = [
    "console",
    "errors",
    "types",
    "units",
    "log",
    "orphans",
    "architectures",
    "config",
    "hf",
    "parallel",
    "layers",
    "models",
    "data",
    "checkpoint",
    "plan",
    "evaluation",
    "training",
    "doctor",
    "quickstart",
    "cli",
]
# What a model is made of knows no run: another trainer imports these rooms.
WITHOUT_A_RUN = ("parallel", "layers", "models")
OF_A_RUN = {"log", "config", "data"}
OUTSIDE_OF_A_RUN = {"argparse", "yaml"}  # of other packages


@functools.cache
def imported(path: Path) -> tuple[str, ...]:
    """Dotted names that a file imports, wherever the import stands."""
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def imports(path: Path) -> set[str]:
    """First parts of what a file imports from the package."""
    names = (name.split(".") for name in imported(path))
    found = {name[1] for name in names if name[0] == "dattn_mcore" and len(name) > 1}
    return found - {"__version__"}


def of_the_package(name: str) -> Path | None:
    """The file of a module of the package; None for other packages, and for what is no module."""
    if name.split(".")[0] != "dattn_mcore":
        return None
    place = PACKAGE.parent.joinpath(*name.split("."))
    files = (place.with_suffix(".py"), place / "__init__.py")
    return next((file for file in files if file.is_file()), None)


@functools.cache
def imported_files(path: Path) -> frozenset[Path]:
    """Files of the package that a file imports."""
    files = {of_the_package(name) for name in imported(path)}
    return frozenset(file for file in files if file is not None)


def reached(path: Path) -> set[Path]:
    """Files of the package that a file imports, and that these import, and so on."""
    found: set[Path] = set()
    following = [path]
    while following:
        following += (new := imported_files(following.pop()) - found)
        found |= new
    return found


def test_imports_point_one_way():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        allowed = set(ORDER[: ORDER.index(room) + 1])
        wrong += [f"{path.relative_to(PACKAGE)}: {name}" for name in imports(path) - allowed]
    assert not wrong


def test_no_two_files_import_each_other():
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]
    assert [str(path.relative_to(PACKAGE)) for path in files if path in reached(path)] == []


@pytest.mark.parametrize("room", WITHOUT_A_RUN)
def test_a_model_knows_no_run(room):
    """Not through others either, which might read settings on its behalf."""
    wrong = []
    for path in sorted((PACKAGE / room).rglob("*.py")):
        for file in {path, *reached(path)}:
            outside = {name.split(".")[0] for name in imported(file)} & OUTSIDE_OF_A_RUN
            own = imports(file) & OF_A_RUN
            wrong += [f"{path.name}, by {file.name}: {name}" for name in own | outside]
    assert not wrong


def test_every_part_has_its_place():
    parts = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name[0] != "_"}
    assert parts - {"py.typed"} == set(ORDER)


def test_an_import_is_found_wherever_it_stands(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("def f():\n    from dattn_mcore.training import loop\nimport dattn_mcore.hf\n")
    assert imports(file) == {"training", "hf"}
    assert PACKAGE / "training/loop.py" in reached(file)
    assert PACKAGE / "config/schema.py" in reached(file)  # by others
