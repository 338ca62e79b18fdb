"""The public functions and classes of a package for mkdocstrings: by module, under their public names."""

import importlib
import inspect

# Larger than a reference needs: the parts of these packages that others than the library itself use.
PICKED = {
    "fastdynat.attacks": "pgd AttackGoal PGDSpec AttackResult CarliniL2 DeepFool SigmaZero",
    "fastdynat.data": "load_test DatasetInfo ImageSet",
    "fastdynat.methods": "Method Inner Outer Networks AttackDefaults",
    "fastdynat.runs": "load_network load_checkpoint Sidecar",
}


def api(package: str) -> str:
    """Everything public of `package`, or what is picked of it, in the order of its names."""
    module = importlib.import_module(package)
    names = PICKED[package].split() if package in PICKED else sorted(module.__all__, key=str.lower)
    return "\n\n".join(
        entry(package, name, getattr(module, name)) for name in names if documented(getattr(module, name))
    )


def documented(value: object) -> bool:
    """True if `value` is a function or class of fastdynat."""
    ours = str(getattr(value, "__module__", "")).startswith("fastdynat")
    return ours and (inspect.isclass(value) or inspect.isfunction(value))


def entry(package: str, name: str, value: type) -> str:
    """mkdocstrings' line for one name; by its public path, a module of that name would be taken instead."""
    where = f"{value.__module__}.{value.__qualname__}"
    return f"::: {where}\n    options:\n      heading: {package}.{name}\n      toc_label: {name}"
