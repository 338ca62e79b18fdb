"""Configurations as flat keys, in a dictionary or a YAML file, with values converted and checked."""

import contextlib
import dataclasses
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from fastdynat import documents
from fastdynat.config.train_config import GROUPS, TrainConfig
from fastdynat.documents import check_text, short_repr
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


def override(config: TrainConfig[Any], values: Mapping[str, Any], origin: str) -> TrainConfig[Any]:
    """`config` updated by the flat `values`.

    Raises:
        UserError: a key that no group or option has (the nearest are suggested), or a value of the wrong
            type. `origin` says where the value came from.
    """
    known = to_flat(config)
    for key in values:
        if not isinstance(key, str):
            raise UserError(f"{origin}: a key must be a name, got {short_repr(key)}")
        if key not in known:
            raise UserError(f"{origin}: {unknown_name('key', str(key), known, brief=True)}")
    parts = {}
    for name, part in _parts(config):
        hints = typing.get_type_hints(type(part))
        own = {f.name for f in dataclasses.fields(part)} & values.keys()
        parts[name] = dataclasses.replace(
            part, **{k: _converted(k, values[k], hints[k], origin) for k in own}
        )
    return dataclasses.replace(
        config, method=_converted("method", values.get("method", config.method), str, origin), **parts
    )


def _converted(key: str, value: Any, hint: Any, origin: str) -> Any:
    """`value` as the type `hint` of the field `key`."""
    value = _as_meant(value, hint)
    options = typing.get_args(hint)
    if typing.get_origin(hint) is Literal and value not in options:
        raise UserError(
            f"{origin}: {unknown_name(key, value if isinstance(value, str) else short_repr(value), options)}"
        )
    try:
        converted = documents.convert(value, hint, origin=origin)
    except documents.DocumentError:
        raise UserError(f"{origin}: {key} must be {_in_words(hint)}, got {short_repr(value)}") from None
    return check_text(converted, f"{origin}: {key}") if isinstance(converted, str) else converted


def _as_meant(value: Any, hint: Any) -> Any:
    """`value` as YAML 1.1 means it for the type `hint`: our reader leaves on, off and 1e-4 as text."""
    kinds = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is tuple:
        return [_as_meant(item, kinds[0]) for item in value] if isinstance(value, list | tuple) else value
    if isinstance(value, bool) and ("on" if value else "off") in kinds:  # a switch with more than two choices
        return "on" if value else "off"
    if bool in kinds and isinstance(value, str):
        return SWITCHES.get(value.lower(), value)
    if float in kinds and str not in kinds and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _in_words(hint: Any) -> str:
    """The type `hint` for a message."""
    if typing.get_origin(hint) is tuple:
        return "a list of numbers"
    kinds = typing.get_args(hint) or (hint,)
    return " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)


def to_yaml(config: TrainConfig[Any]) -> str:
    """`config` as the text of a configuration file that `read_config_file` takes back."""
    return yaml.safe_dump(to_flat(config), sort_keys=False)


def read_config_file(path: Path) -> dict[str, Any]:
    """The flat keys of the configuration file at `path`.

    Raises:
        UserError: it cannot be read, or is not YAML of `key: value` lines.
    """
    values = documents.read_yaml_value(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `key: value` lines, got a {type(values).__name__}")
    return values
