"""Definitions of records: one YAML file each, with what it changes and its training flags."""

import datetime
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from fastdynat.commands.speedrun.race_rules import TARGETS, check_record_flags
from fastdynat.documents import convert, parse_yaml, read_yaml_value, short_repr
from fastdynat.errors import UserError, unknown_name

FOLDER = "records"
Track = Literal["cpu-2", "gpu-1"]


@dataclass(frozen=True, kw_only=True)
class RecordDefinition:
    """A record: everything that decides its laps but data, seed and machine.

    Attributes:
        name: of its file.
        about: what it is, in one line.
        date: of the definition, YYYY-MM-DD.
        track: the machine.
        target: mean test accuracy under PGD-20 that its laps have to reach, in (0, 1].
        against: name of the earlier record that it changes; None for the first.
        changed: what is changed against it, in one sentence.
        algorithm: where it changes the algorithm, and not only its speed or schedule: how, in one sentence;
            "" where it does not.
        predicted: the factor by which it shortens the earlier record, and how it was counted before the race;
            "" without a prediction.
        loop: "fastdynat", or "plain": `plain_loop`.
        train: flags of `fastdynat train`; of the plain loop, `PlainSettings`.
    """

    name: str
    about: str
    date: str
    track: Track
    target: float
    against: str | None
    changed: str
    algorithm: str
    loop: Literal["fastdynat", "plain"]
    train: dict[str, Any]
    predicted: str = ""


def definition_names() -> list[str]:
    """The names that --record takes, in alphabetical order."""
    found = files(__package__).joinpath(FOLDER).iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in found if entry.name.endswith(".yaml"))


def read_definition(name: str) -> RecordDefinition:
    """The record called `name`, or in the YAML file `name`.

    Raises:
        UserError: there is none, its file is damaged, or the rules do not allow one of its flags.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        return _checked(path.stem, read_yaml_value(path), name)
    return _packaged(name)


def newest_definition(track: str) -> RecordDefinition:
    """The record of `track` at the track's own target with the latest date; of one date, the one that most
    others lead to; of such, one in float32, which every processor is fast in.
    """
    records = {name: read_definition(name) for name in definition_names()}
    found = [r for r in records.values() if (r.track, r.target) == (track, TARGETS[track])]
    if not found:
        raise UserError(f"track {track} has no record yet; name a YAML file with --record")

    def rank(record: RecordDefinition) -> tuple[str, int, bool]:
        return record.date, earlier_records(record, records), record.train.get("amp") == "off"

    return max(found, key=rank)


def earlier_records(record: RecordDefinition, records: dict[str, RecordDefinition]) -> int:
    """The number of `records` in the chain that leads to `record`, without it."""
    chain = [record.name]
    while (name := record.against) in records and name not in chain:
        chain.append(name)
        record = records[name]
    return len(chain) - 1


@cache
def _packaged(name: str) -> RecordDefinition:
    if name not in definition_names():
        raise unknown_name("record", name, definition_names())
    text = files(__package__).joinpath(FOLDER, f"{name}.yaml").read_text(encoding="utf-8")
    return _checked(name, parse_yaml(text, origin=f"record {name}"), f"record {name}")


def _checked(name: str, values: Any, origin: str) -> RecordDefinition:
    if not isinstance(values, dict):
        raise UserError(f"{origin} must hold `key: value` lines, got a {type(values).__name__}")
    known = [field.name for field in fields(RecordDefinition) if field.name != "name"]
    for key in values:
        if key not in known:
            raise UserError(f"{origin}: {unknown_name('key', str(key), known)}")
    record = convert({"name": name, **values}, RecordDefinition, origin=origin, why="see docs/speedrun.md")
    if not 0 < record.target <= 1:
        raise UserError(f"{origin}: target must be a share in (0, 1], got {record.target:g}")
    try:
        datetime.date.fromisoformat(record.date)
    except ValueError:
        raise UserError(f"{origin}: date must be YYYY-MM-DD, got {short_repr(record.date)}") from None
    check_record_flags(record.train, record.loop, origin)
    return record
