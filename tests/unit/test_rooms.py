"""A part of the package imports only from parts above it: no cycles, lazy imports included."""

import ast
from pathlib import Path

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
    "quickstart",
    "cli",
]


def imports(path: Path) -> set[str]:
    """First parts of what a file imports from the package, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            whole = node.module == "dattn_mcore"
            names = [f"{node.module}.{a.name}" for a in node.names] if whole else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("dattn_mcore.")}
    return found - {"__version__"}


def test_imports_point_one_way():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        allowed = set(ORDER[: ORDER.index(room) + 1])
        wrong += [f"{path.relative_to(PACKAGE)}: {name}" for name in imports(path) - allowed]
    assert not wrong


def test_every_part_has_its_place():
    parts = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name[0] != "_"}
    assert parts - {"py.typed"} == set(ORDER)


def test_an_import_is_found_wherever_it_stands(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("def f():\n    from dattn_mcore.training import loop\nimport dattn_mcore.hf\n")
    assert imports(file) == {"training", "hf"}
