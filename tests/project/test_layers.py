"""Layers: modules import only their own and lower rooms, without circles; kernels/ only torch and triton."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Lowest first. A room is a module or package of fastdynat, or a package inside one ("commands.evaluate");
# what lies in none of the inner rooms belongs to the outer one. Rooms of one layer do not import each other.
LAYERS = [
    {"caller_warnings", "errors", "kernels", "lazy"},
    {"freed_memory", "launch", "units"},
    {"documents", "terminal", "machine"},
    {"user_code", "distributed"},
    {"config", "execution"},
    {"verification", "recipes"},
    {"ops"},
    {"ops.checks"},
    {"data", "tuning"},
    {"models"},
    {"runs"},
    {"attack_engine"},
    {"attacks"},
    {"compat", "methods"},
    {"evaluation"},
    {"training"},
    {"commands.parsing"},
    {"commands"},
    {"api"},
    {"__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def sources() -> dict[str, Path]:
    """All Python files of the package by module name; kernels/ is read in place, not through the link."""
    files = {
        path.relative_to(ROOT): path
        for path in (ROOT / "fastdynat").rglob("*.py")
        if "kernels" not in path.parts
    }
    files |= {Path("fastdynat", path.relative_to(ROOT)): path for path in (ROOT / "kernels").rglob("*.py")}
    return {
        ".".join(name.with_suffix("").parts).removesuffix(".__init__"): path for name, path in files.items()
    }


def imported(module: str, source: str, is_package: bool) -> set[str]:
    """Absolute dotted names that `source` imports, wherever in the file; for `from a import b`: a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            up = len(parts) - node.level + is_package
            base = ".".join([*(parts[:up] if node.level else []), *filter(None, [node.module])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def room(module: str) -> str | None:
    """The innermost room that `module` (a dotted name below fastdynat) lies in."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in RANK), None)


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """Imports of `module` from rooms that are not below its own."""
    own = room(module.partition(".")[2])
    found = []
    for name in sorted(imported(module, source, is_package)):
        package, _, target = name.partition(".")
        if package != "fastdynat" or target in ("", "__version__", "_C"):
            continue
        other = room(target)
        if other is None:
            found.append(f"{module} imports {name}, which is in no layer")
        elif own is not None and other != own and RANK[other] >= RANK[own]:
            found.append(f"{module} (layer {RANK[own]}) imports {name} (layer {RANK[other]})")
    return found


def imports() -> dict[str, set[str]]:
    """Each module's imports. Packages are left out: they re-export their modules' names."""
    files = sources()
    known = {name for name, path in files.items() if path.name != "__init__.py"}
    graph = {}
    for module in known:
        targets = set()
        for name in imported(module, files[module].read_text(), False):
            parent = name.rpartition(".")[0]
            targets |= {found for found in (name, parent) if found in known}
        graph[module] = targets - {module}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, in order; empty where there are none."""
    done: set[str] = set()
    for start in graph:
        path: list[str] = []
        pending: list[Iterator[str]] = [iter([start])]
        while pending:
            module = next(pending[-1], None)
            if module is None:
                pending.pop()
                done.update(path[-1:])
                path[-1:] = []
            elif module in path:
                return [*path[path.index(module) :], module]
            elif module not in done:
                path.append(module)
                pending.append(iter(sorted(graph.get(module, ()))))
    return []


def test_every_module_belongs_to_a_layer() -> None:
    homeless = {name for name in sources() if "." in name and room(name.partition(".")[2]) is None}
    assert not homeless, f"add to LAYERS: {sorted(homeless)}"


def test_every_room_is_there() -> None:
    names = {name.partition(".")[2] for name in sources()}
    assert [
        name
        for name in sorted(RANK)
        if not any(module == name or module.startswith(f"{name}.") for module in names)
    ] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(imports()) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []


@pytest.mark.parametrize("module", sorted(sources()))
def test_modules_import_only_lower_layers(module: str) -> None:
    path = sources()[module]
    assert violations(module, path.read_text(), path.name == "__init__.py") == []


def test_kernels_import_only_torch_triton_and_each_other() -> None:
    allowed = sys.stdlib_module_names | {"torch", "triton"}
    for module, path in sources().items():
        if module.startswith("fastdynat.kernels"):
            names = {
                name
                for name in imported(module, path.read_text(), False)
                if not name.startswith("fastdynat.kernels.")
            }
            foreign = {name.split(".")[0] for name in names} - allowed
            assert not foreign, f"{module} imports {sorted(foreign)}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastdynat.ops.step", "from fastdynat.attack_engine import pgd"),
        ("fastdynat.data.embedded", "import fastdynat.models.resnet"),
        ("fastdynat.models.resnet", "def f():\n    from ..training import train"),
        ("fastdynat.models.resnet", "from fastdynat import training as engine"),
        ("fastdynat.commands.main", "from fastdynat.nowhere import f"),
    ],
)
def test_the_check_finds_violations(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    "source", ["from . import sgd", "from fastdynat import ops", "from ..config import X", "import os"]
)
def test_the_check_accepts_lower_layers(source: str) -> None:
    assert violations("fastdynat.training.train", source) == []
