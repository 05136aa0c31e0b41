"""Imports point one way, as CONTRIBUTING.md says."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from tests.conftest import ROOT

# From the top of the house to its foundation. What stands in a line imports from the lines below it, and from its own
# folder. A module outside of the folders is named as one; those not named here are of `others`.
HOUSE = [
    {"commands"},
    {"doctor", "parity", "experiments", "chat", "export"},
    {"tasks", "adapters"},
    {"training", "merging", "hub", "prediction"},
    {"run", "generation"},
    {"resources"},
    {"backends", "base"},
    {"settings"},
    {"data"},
    {"fast", "peft_model"},
    {"others"},
    {"lora"},
]


def modules() -> dict[str, Path]:
    source = ROOT / "src" / "plainlora"
    found = {}
    for path in source.rglob("*.py"):
        name = ".".join(path.relative_to(source).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        found[name] = path
    return found


def names_imported(path: Path) -> set[str]:
    """What a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported(path: Path) -> set[str]:
    """Those of them that are this package's modules."""
    known, names = set(modules()), names_imported(path)
    inside = {name.removeprefix("plainlora").lstrip(".") for name in names if name.split(".")[0] == "plainlora"}
    return {name for name in inside if name in known and name}


def room(module: str) -> str:
    """The folder of a module, or the module itself where it stands outside of them."""
    top = module.split(".", maxsplit=1)[0]
    return top if any(top in line for line in HOUSE) else "others"


def test_imports_point_down_the_house() -> None:
    line = {name: number for number, names in enumerate(HOUSE) for name in names}
    folders = {name.split(".")[0] for name in modules() if "." in name}
    assert folders <= line.keys(), "every folder has its line"
    checked = 0
    for name, path in modules().items():
        for target in imported(path):
            if name and room(name) != room(target):
                assert line[room(target)] > line[room(name)], f"{name} imports {target}"
                checked += 1
    assert checked > 300


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {name: {target for target in imported(path) if target != name} for name, path in modules().items() if name}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, naming the circle
    assert graph.keys() <= set(order)
    assert len(graph) > 100


def test_the_method_imports_none_of_its_siblings_and_no_trainer() -> None:
    for path in (ROOT / "src" / "plainlora" / "lora").glob("*.py"):
        text = path.read_text()
        assert all(name.startswith("lora.") for name in imported(path) - {"lora"}), path
        assert not any(f"import {library}" in text or f"from {library}" in text for library in ("trl", "datasets"))


def test_the_package_imports_nothing_else_of_the_checkout_and_there_is_no_drawer_for_everything() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        assert not {"recipes", "benchmarks", "tests"} & {name.split(".")[0] for name in names_imported(path)}, path
        assert path.name != "utils.py"
