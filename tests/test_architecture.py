"""The packages and modules of DESIGN.md, held against the code."""

import ast
import collections
import pathlib
import re

import pytest

import keras_taylor

ROOT = pathlib.Path(__file__).parent.parent
HOUSE = ROOT / "keras_taylor"
ROWS = re.findall(r"^\| `(\w+)/` \| (.*) \| (`.*`) \|$", (ROOT / "DESIGN.md").read_text(), re.MULTILINE)
PACKAGES = {name: re.findall(r"`(\w+)`", modules) for name, _, modules in ROWS}
ORDER = [*PACKAGES, "__main__"]
MODULES = [(package, module) for package, modules in PACKAGES.items() for module in modules]
FILES = sorted(HOUSE.rglob("*.py"))
MOST_ENTRIES, MOST_MODULES, MOST_PARAMETERS, MOST_PUBLIC_PARAMETERS = 14, 13, 8, 15

pytestmark = pytest.mark.once


def tree_of(path):
    return ast.parse(path.read_text())


def functions_in(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def imported(path):
    """Package and module (`None` where a whole package is named) of all imports anywhere in a file.

    Imports in strings count, too: of code that another process runs.
    """
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = re.findall(r"from (keras_taylor\.[\w.]+) import", node.value)
        else:
            continue
        for name in names:
            _, *parts = name.split(".")
            if name.startswith("keras_taylor.") and parts[0] in PACKAGES:
                is_module = len(parts) > 1 and parts[1] in PACKAGES[parts[0]]
                yield parts[0], parts[1] if is_module else None


def test_every_package_has_a_row_and_every_row_a_package():
    assert sorted(PACKAGES) == sorted(p.parent.name for p in HOUSE.glob("*/__init__.py"))


def test_the_house_stays_small():
    entries = [p for p in HOUSE.iterdir() if p.name != "__pycache__"]
    assert len(entries) <= MOST_ENTRIES, sorted(p.name for p in entries)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_has_its_place_in_the_row_of_its_package(package):
    modules = sorted(p.stem for p in (HOUSE / package).glob("*.py") if p.stem != "__init__")
    assert sorted(PACKAGES[package]) == modules
    assert len(modules) + 1 <= MOST_MODULES


@pytest.mark.parametrize(("package", "module"), MODULES)
def test_a_module_imports_only_what_stands_before_it(package, module):
    found = set(imported(HOUSE / package / f"{module}.py"))
    later = {p for p, _ in found if ORDER.index(p) > ORDER.index(package)}
    assert later == set(), "packages that stand further down in DESIGN.md"
    within = PACKAGES[package]
    beside = {m for p, m in found if p == package} - {None, module}
    assert {m for m in beside if within.index(m) >= within.index(module)} == set(), "modules further right"


@pytest.mark.parametrize("package", PACKAGES)
def test_the_first_docstring_line_of_a_package_is_its_caption(package):
    caption = next(caption for name, caption, _ in ROWS if name == package)
    assert ast.get_docstring(tree_of(HOUSE / package / "__init__.py")).splitlines()[0] == caption


def test_no_package_or_module_bears_the_name_of_a_public_function():
    names = {*PACKAGES, *(module for _, module in MODULES)}
    assert names & {*keras_taylor.__all__} == {"criteria"}  # a public module


def parameters_of(function):
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [argument for argument in named if argument.arg not in ("self", "cls")]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_functions_take_few_parameters_and_all_have_types(path):
    for function in functions_in(tree_of(path)):
        most = MOST_PUBLIC_PARAMETERS if function.name in keras_taylor.__all__ else MOST_PARAMETERS
        parameters = parameters_of(function)
        assert len(parameters) <= most, function.name
        assert all(parameter.annotation for parameter in parameters), function.name
        assert function.returns is not None, function.name


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_is_found_by_its_address(path):
    """`id(...)` of an object that is gone may be that of another; see `support.identity`."""
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    assert not any(isinstance(call.func, ast.Name) and call.func.id == "id" for call in calls)


def test_a_top_level_name_is_defined_in_one_module():
    modules = collections.defaultdict(set)
    for path in FILES:
        for node in tree_of(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                modules[node.name].add(path.name)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name) and target.id != "__all__":
                        modules[target.id].add(path.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                modules[node.target.id].add(path.name)
    assert {name: found for name, found in modules.items() if len(found) > 1} == {}
