"""Who may import whom: a module imports only its own sub-package and lower layers; kernels/ only torch and
triton.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Lowest first; a name is a sub-package or a module of fastdynat. Names of one layer do not import each other.
LAYERS = [
    {"errors", "kernels", "lazy"},
    {"units"},
    {"documents", "terminal", "machine"},
    {"config", "execution"},
    {"verification", "recipes"},
    {"ops"},
    {"data", "tuning"},
    {"models"},
    {"runs"},
    {"attack_engine"},
    {"attacks"},
    {"compat", "methods"},
    {"evaluation"},
    {"training"},
    {"commands"},
    {"__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def sources() -> dict[str, Path]:
    """Every Python file of the package by module name. kernels/ is read where it lies, not through the
    link.
    """
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


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What `module` imports from layers that are not below its own."""
    own = module.partition(".")[2].partition(".")[0]
    found = []
    for name in sorted(imported(module, source, is_package)):
        parts = name.split(".")
        target = parts[1] if parts[0] == "fastdynat" and len(parts) > 1 else None
        if target is None or target in (own, "__version__", "_C"):
            continue
        if target not in RANK:
            found.append(f"{module} imports {name}, which is in no layer")
        elif own in RANK and RANK[target] >= RANK[own]:
            found.append(f"{module} (layer {RANK[own]}) imports {name} (layer {RANK[target]})")
    return found


def test_every_module_belongs_to_a_layer() -> None:
    names = {name.split(".")[1] for name in sources() if "." in name}
    assert names <= RANK.keys(), f"add to LAYERS: {sorted(names - RANK.keys())}"


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
