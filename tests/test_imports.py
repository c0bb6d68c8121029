"""The core is light to import and knows nothing of the layers built on it; each file imports what stands above it in
CONTRIBUTING.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import matchdistill

PACKAGE = Path(matchdistill.__file__).parent
TABLE = Path(__file__).parents[1] / "CONTRIBUTING.md"
CORE = ("functional", "reduction", "matching", "trace", "taps", "choice", "distiller", "refresh", "baselines")
OUTER_LAYERS = {
    f"matchdistill.{name}" for name in ("tasks", "data", "models", "cli", "commands", "runs", "integrations", "report")
}
HEAVY = {"pytorch_lightning", "lightning", "lightning_fabric", "timm", "torchvision"}
NOT_IMPORTED = ("pytorch_lightning", "lightning", "lightning_fabric", "timm", "torchvision", "sklearn")


def imported_modules(source: str, module: str, is_package: bool = False) -> set[str]:
    """Absolute dotted names of all that the source imports, anywhere in it; both A and A.b for `from A import b`."""
    package = module if is_package else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def modules_of(path: Path) -> set[str]:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    return imported_modules(path.read_text("utf-8"), ".".join(parts[:-1] if is_package else parts), is_package)


def within(name: str, roots: set[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def file_of(name: str) -> Path | None:
    """The file of a module of this package, None for any other name and for the package itself."""
    stem = PACKAGE.parent.joinpath(*name.split("."))
    candidates = (stem.with_suffix(".py"), stem / "__init__.py")
    return next((path for path in candidates if PACKAGE in stem.parents and path.is_file()), None)


def core_files() -> list[Path]:
    """The core's modules and every module of this package that they import, directly or not."""
    found: set[Path] = set()
    waiting = {f"matchdistill.{name}" for name in CORE}
    while waiting:
        name = waiting.pop()
        path = None if within(name, OUTER_LAYERS) else file_of(name)
        if path and path not in found:
            found.add(path)
            waiting |= modules_of(path)
    return sorted(found)


CORE_FILES = core_files()


def test_imported_modules_resolves_every_form_of_import():
    source = (
        "import os.path\nfrom . import models\nfrom .tasks.x import y\ndef f():\n    from matchdistill import cli\n"
    )
    assert imported_modules(source, "matchdistill.taps") == {
        "os.path",
        "matchdistill",
        "matchdistill.models",
        "matchdistill.tasks.x",
        "matchdistill.tasks.x.y",
        "matchdistill.cli",
    }
    assert "matchdistill.data" in imported_modules("from .. import data", "matchdistill.tasks.seg")
    assert "matchdistill.tasks.seg" in imported_modules("from . import seg", "matchdistill.tasks", is_package=True)


def test_core_modules_exist():
    assert {path.name for path in CORE_FILES} >= {"functional.py", "reduction.py", "matching.py"}


@pytest.mark.parametrize("path", CORE_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_core_modules_import_nothing_of_the_outer_layers(path):
    assert sorted(name for name in modules_of(path) if within(name, OUTER_LAYERS | HEAVY)) == []


def order() -> list[str]:
    """The files of the package as CONTRIBUTING's table has them, from the top."""
    table = TABLE.read_text("utf-8").partition("| file | what it is |")[2].partition("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| ")]
    return [name for cell in cells for name in re.findall(r"`([\w/]+\.py)`", cell)]


FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
# The public names, the command, and folders whose own file says no more than what they are for.
PLACELESS = {"__init__.py", "__main__.py"} | {
    name
    for name, path in FILES.items()
    if path.name == "__init__.py" and len(path.read_text("utf-8").splitlines()) == 1
}


def test_the_table_has_every_file_once_and_no_other():
    assert sorted(order()) == sorted(FILES.keys() - PLACELESS)


@pytest.mark.parametrize("name", sorted(FILES.keys() - PLACELESS))
def test_a_file_imports_only_what_stands_before_it(name):
    places = {str(FILES[each]): place for place, each in enumerate(order())}
    imported = {str(found) for each in modules_of(FILES[name]) if (found := file_of(each))}
    assert sorted(each for each in imported if places.get(each, -1) > places[str(FILES[name])]) == []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_imports_the_tests(path):
    assert sorted(name for name in modules_of(path) if within(name, {"tests", "oracles", "pytest", "hypothesis"})) == []


def test_importing_the_package_loads_no_heavy_dependency():
    script = (
        "import sys\n"
        "import matchdistill\n"
        "import matchdistill.functional\n"
        f"print(sorted(set({NOT_IMPORTED!r}) & set(sys.modules)))\n"
    )
    search_path = os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": search_path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
