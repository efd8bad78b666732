"""The floors and captions of DESIGN.md, held against the code."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ROWS = re.findall(
    r"^\| (\d+) \| `(\w+)(?:\.py|/)` \| (.*) \|$", (ROOT / "DESIGN.md").read_text(), re.MULTILINE
)
FLOORS = {name: int(floor) for floor, name, _ in ROWS}


def files_of(name):
    package = ROOT / "keras_taylor" / name
    return sorted(package.glob("*.py")) if package.is_dir() else [package.with_suffix(".py")]


def imported(path):
    """Modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("keras_taylor."))


def test_every_module_has_a_row_and_every_row_a_module():
    paths = (ROOT / "keras_taylor").iterdir()
    modules = {p.stem for p in paths if p.suffix == ".py" or (p / "__init__.py").exists()} - {"__init__"}
    assert sorted(FLOORS) == sorted(modules)


@pytest.mark.parametrize("name", FLOORS)
def test_a_module_imports_only_from_lower_floors(name):
    found = {module for path in files_of(name) for module in imported(path)} - {name}
    assert {module for module in found if FLOORS[module] >= FLOORS[name]} == set()


@pytest.mark.parametrize(("name", "caption"), [(name, caption) for _, name, caption in ROWS])
def test_the_first_docstring_line_is_the_caption(name, caption):
    assert ast.get_docstring(ast.parse(files_of(name)[0].read_text())).splitlines()[0] == caption


@pytest.mark.parametrize("name", FLOORS)
def test_no_module_bears_the_name_of_a_function(name):
    functions = [
        n.name
        for p in files_of(name)
        for n in ast.walk(ast.parse(p.read_text()))
        if hasattr(n, "args") and hasattr(n, "name")
    ]
    assert name not in functions
