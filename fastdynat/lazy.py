"""Public names of a package that are imported at their first use (PEP 562), so that the command line starts
without torch.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` for `package`.

    Args:
        package: its ``__name__``.
        names: the public names by the module that has them, under `package` or, written out, elsewhere in
            fastdynat. None may be called like a submodule, which Python would put in its place.
    """
    origin = {name: module for module, own in names.items() for name in own}

    def getattr_(name: str) -> Any:
        if name not in origin:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = origin[name]
        module = module if module.startswith("fastdynat.") else f"{package}.{module}"
        value = getattr(importlib.import_module(module), name)
        setattr(sys.modules[package], name, value)
        return value

    def dir_() -> list[str]:
        return sorted({*vars(sys.modules[package]), *origin})

    return getattr_, dir_
