"""Lazy imports: those that run at once, the moment the others follow, and unchanged behaviour."""

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastdynat.lazy import finish_imports, import_late
from fastdynat.methods import METHODS, method_class


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `latepkg` with a module `heavy`."""
    folder = tmp_path / "latepkg"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "heavy.py").write_text("value = 7\nclass Base:\n    pass\ndef mark(f):\n    return f\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "latepkg":
            del sys.modules[name]


def late(package: Path, source: str, name: str = "light") -> ModuleType:
    (package / f"{name}.py").write_text(textwrap.dedent(source))
    return import_late(f"latepkg.{name}")


def heavy_is_in() -> bool:
    return "latepkg.heavy" in sys.modules


LIGHT = """
    from __future__ import annotations
    from dataclasses import dataclass
    from latepkg.heavy import value, Base
    import latepkg.heavy as whole

    @dataclass(frozen=True)
    class Options:
        size: int = 3

    class Method:
        options_type = Options
        def compute(self, base: Base) -> int:
            return value + whole.value
"""


def test_imports_of_functions_wait_for_the_first_look(package: Path) -> None:
    module = late(package, LIGHT)
    assert not heavy_is_in()
    assert module.__name__ == "latepkg.light"
    assert vars(module)["Options"]().size == 3  # what the registry does: no look through the module
    assert not heavy_is_in()
    assert module.Method().compute(None) == 14
    assert heavy_is_in()
    assert type(module) is ModuleType


def test_a_from_import_elsewhere_is_a_look(package: Path) -> None:
    late(package, LIGHT)
    scope: dict[str, Any] = {}
    exec("from latepkg.light import Method", scope)
    assert heavy_is_in()
    assert scope["Method"]().compute(None) == 14


@pytest.mark.parametrize(
    "source",
    [
        "from latepkg.heavy import Base\nclass A(Base): pass",
        "from latepkg.heavy import mark\n@mark\ndef f(): pass",
        "from latepkg.heavy import value\ndef f(x=value): pass",
        "from latepkg.heavy import value\ndef f(*, x=value): pass",
        "from latepkg.heavy import value\nTABLE = {'a': value}",
        "from latepkg.heavy import value\ndef table(): return value\nTABLE = table()",
        "from latepkg.heavy import value\nclass T:\n    def __init__(self): self.x = value\nTABLE = T()",
        "from latepkg.heavy import value\nclass A:\n    x: int = value",
        "from latepkg.heavy import Base\ndef f(x: Base): pass",
        "from latepkg.heavy import Base\ndef f() -> Base: pass",
        "import latepkg.heavy\nX = latepkg.heavy.value",
    ],
)
def test_what_the_module_needs_while_it_runs_is_imported_at_once(package: Path, source: str) -> None:
    late(package, source)
    assert heavy_is_in()


def test_a_needed_sibling_is_late_too_and_both_end_complete(package: Path) -> None:
    (package / "first.py").write_text(
        "from latepkg.heavy import value\nclass First:\n    def compute(self):\n        return value\n"
    )
    module = late(package, "from latepkg.first import First\nclass Second(First): pass", "second")
    assert not heavy_is_in()
    second = vars(module)["Second"]
    finish_imports(module)
    assert heavy_is_in()
    assert second().compute() == 7
    assert sys.modules["latepkg.first"].First is second.__mro__[1]


def test_a_module_that_is_there_is_taken_as_it_is(package: Path) -> None:
    (package / "light.py").write_text(textwrap.dedent(LIGHT))
    scope: dict[str, Any] = {}
    exec("import latepkg.light", scope)
    assert import_late("latepkg.light") is scope["latepkg"].light
    assert heavy_is_in()


def test_a_module_that_fails_leaves_nothing(package: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        late(package, "X = 1 / 0")
    assert "latepkg.light" not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        import_late("latepkg.nowhere")


def test_a_late_import_that_fails_fails_again(package: Path) -> None:
    module = late(package, "from latepkg.nowhere import x\ndef f(): return x")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="nowhere"):
            module.f  # noqa: B018
    (package / "nowhere.py").write_text("x = 5")
    assert module.f() == 5


def test_torch_compiles_through_a_method_that_came_late() -> None:
    """In a process where the registry was first: no module of the methods was imported ordinarily."""
    code = """
import sys, torch, torch._dynamo
from fastdynat.methods import METHODS
assert len(METHODS) > 20
for name in ("trades", "rslad"):
    assert "__late_imports__" in vars(sys.modules[f"fastdynat.methods.{name}"])
assert "torch._dynamo" in sys.modules
METHODS["trades"]
from fastdynat.data import Batch
from fastdynat.methods.trades import Trades, TradesOptions
torch.manual_seed(0)
x, labels = torch.rand(4, 3), torch.tensor([0, 1, 2, 0])
trades, batch = Trades(TradesOptions()), Batch(x, labels, torch.arange(4))
def loss(clean):
    return trades.fit(clean, batch).loss
clean = torch.randn(4, 3)
assert torch.equal(torch.compile(loss, backend="eager", fullgraph=True)(clean), loss(clean))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", METHODS)
def test_the_class_of_a_method_has_all_its_imports(name: str) -> None:
    cls = method_class(name)
    for base in cls.__mro__:
        module = sys.modules[base.__module__]
        assert "__late_imports__" not in vars(module), base
    assert torch is sys.modules["torch"]
