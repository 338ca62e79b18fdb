"""Configurations as flat dictionaries and as YAML: values from outside get the type of their field, or are
refused by name.
"""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from fastdynat import documents
from fastdynat.config.groups import GROUPS, TrainConfig
from fastdynat.documents import check_text, shown
from fastdynat.errors import UserError, unknown_name

SWITCHES = {"yes": True, "on": True, "no": False, "off": False}  # what YAML 1.1 reads as true and false


def _parts(config: TrainConfig[Any]) -> Iterator[tuple[str, Any]]:
    """The groups of `config` by attribute name, the method's options among them."""
    yield from ((name, getattr(config, name)) for name in (*GROUPS, "options"))


def to_flat(config: TrainConfig[Any]) -> dict[str, Any]:
    """`config` as one flat dictionary of plain values, in declaration order."""
    flat: dict[str, Any] = {"method": config.method}
    for _, part in _parts(config):
        for f in dataclasses.fields(part):
            value = getattr(part, f.name)
            flat[f.name] = list(value) if isinstance(value, tuple) else value
    return flat


def update(config: TrainConfig[Any], values: Mapping[str, Any], origin: str) -> TrainConfig[Any]:
    """`config` with the flat `values` put in.

    Raises:
        UserError: a key that no group or option has (the nearest are suggested), or a value of the wrong
            type. `origin` says where the value came from.
    """
    known = to_flat(config)
    for key in values:
        if not isinstance(key, str):
            raise UserError(f"{origin}: a key must be a name, got {shown(key)}")
        if key not in known:
            raise UserError(f"{origin}: {unknown_name('key', str(key), known)}")
    parts = {}
    for name, part in _parts(config):
        hints = typing.get_type_hints(type(part))
        own = {f.name for f in dataclasses.fields(part)} & values.keys()
        parts[name] = dataclasses.replace(part, **{k: _coerce(k, values[k], hints[k], origin) for k in own})
    return dataclasses.replace(
        config, method=_coerce("method", values.get("method", config.method), str, origin), **parts
    )


def _coerce(key: str, value: Any, hint: Any, origin: str) -> Any:
    """`value` as the type `hint`, which is one of the few kinds that the fields above use."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        if value not in options:
            # YAML reads a bare `off` as False, and `on` as True.
            if isinstance(value, bool) and ("on" if value else "off") in options:
                return "on" if value else "off"
            raise UserError(
                f"{origin}: {unknown_name(key, value if isinstance(value, str) else shown(value), options)}"
            )
        return value
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{origin}: {key} must be a list of numbers, got {shown(value)}")
        return tuple(_coerce(key, v, options[0], origin) for v in value)
    kinds = options or (hint,)
    for kind in kinds:
        if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return check_text(value, f"{origin}: {key}") if kind is str else value
    if bool in kinds and isinstance(value, str) and value.lower() in SWITCHES:
        return SWITCHES[value.lower()]
    if (
        float in kinds
        and not isinstance(value, bool)
        and isinstance(value, int if str in kinds else (int, str))
    ):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as a string
        except (ValueError, OverflowError):
            pass
    names = " or ".join("nothing" if k is type(None) else k.__name__ for k in kinds)
    raise UserError(f"{origin}: {key} must be {names}, got {shown(value)}")


def to_yaml(config: TrainConfig[Any]) -> str:
    """`config` as the text of a configuration file that `read_yaml` takes back."""
    return yaml.safe_dump(to_flat(config), sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """The flat keys of the configuration file at `path`.

    Raises:
        UserError: it cannot be read, or is not YAML of `key: value` lines.
    """
    values = documents.read_yaml(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `key: value` lines, got a {type(values).__name__}")
    return values
