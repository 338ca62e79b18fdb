"""RobustBench's network classes, without the package around them: its dependencies are not needed."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ARCHITECTURES = "robustbench.model_zoo.architectures"


def loaded() -> dict[str, ModuleType]:
    """The modules of RobustBench in sys.modules."""
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "robustbench"}


@contextmanager
def robustbench_module(name: str) -> Iterator[Any]:
    """Import `robustbench.model_zoo.architectures.NAME`; skip the test where this release has no such file.

    Afterwards sys.modules has the same modules of RobustBench as before.
    """
    spec = importlib.util.find_spec("robustbench")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    if not (root / "model_zoo" / "architectures" / f"{name}.py").is_file():
        pytest.skip(f"the installed release of RobustBench has no {ARCHITECTURES}.{name}")
    before = loaded()
    try:
        for package_name in ("robustbench", "robustbench.model_zoo", ARCHITECTURES):
            package = ModuleType(package_name)
            package.__path__ = [str(root.joinpath(*package_name.split(".")[1:]))]
            sys.modules[package_name] = package
        yield importlib.import_module(f"{ARCHITECTURES}.{name}")
    finally:
        for module_name in loaded():
            del sys.modules[module_name]
        sys.modules.update(before)
