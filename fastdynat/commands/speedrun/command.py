"""`fastdynat speedrun`: the flags and the checks that need no torch."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastdynat.commands.message_flags import MessageFlags, printed_messages
from fastdynat.commands.parsing.parse import parse
from fastdynat.commands.speedrun.record_definition import (
    RecordDefinition,
    newest_definition,
    read_definition,
)
from fastdynat.config.value_ranges import check_values
from fastdynat.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SpeedrunCommand:
    """Race to a robust accuracy on CIFAR-10: train a record once per seed, time it, evaluate it, and write
    one JSON file. The rules are in docs/speedrun.md.
    """

    record: str | None = None
    """Record to run, or several, separated by commas, which take turns seed by seed: names (--list), or YAML
    files of your own. None is the newest record of --track at its own target."""
    target: float | None = None
    """Mean test accuracy under PGD-20 to reach, as a share; None is the record's own target."""
    seeds: int = 3
    """Number of seeds, counted from 0. A record needs three."""
    track: Literal["cpu-2", "gpu-1"] | None = None
    """Machine: cpu-2 is two CPU cores, gpu-1 one H100 or H200. None is the record's own, and cpu-2 without
    --record."""
    data: Literal["cifar10", "imagefolder"] = "cifar10"
    """CIFAR-10 as torchvision's arrays, or as a folder of images."""
    data_dir: str = "data"
    """Folder of the images; for imagefolder, the folder that holds train/ and test/."""
    out: str = "runs/speedrun"
    """Folder of the run directories and of the result, NAME.json. The same command continues a race that was
    stopped there, from the first lap that is not finished."""
    log: str | None = None
    """Folder of the results that --list shows. None is bench/records of the checkout that fastdynat is
    imported from."""
    quick: bool = False
    """Evaluate without AutoAttack and masking checks, to try something out; such a result does not count. The
    same command without this flag adds them."""
    list_records: Annotated[bool, tyro.conf.arg(name="list")] = False
    """Print the records with their results, and stop."""
    messages: MessageFlags = field(default_factory=MessageFlags)


def speedrun_command(argv: list[str]) -> int:
    """Run `fastdynat speedrun`."""
    command = parse(SpeedrunCommand, argv, "speedrun").command
    check_values(command)
    if command.list_records:
        from fastdynat.commands.speedrun.shown_log import show_log, stored_results
        from fastdynat.terminal.consoles import output_console

        folder = stored_results() if command.log is None else Path(command.log)
        show_log(output_console(), folder, command.track)
        return 0
    records = _records(command)

    from fastdynat.terminal.consoles import error_console, output_console

    messages = command.messages
    with printed_messages(messages.log_level, error_console(), quiet=messages.quiet):
        from fastdynat.commands.speedrun.run_race import Race, run_race
        from fastdynat.terminal.progress import ProgressDisplay

        race = Race(
            records=records,
            target=command.target,
            seeds=command.seeds,
            data=command.data,
            data_dir=Path(command.data_dir),
            out=Path(command.out),
            quick=command.quick,
            command=_as_written(command, records),
        )
        return run_race(race, output_console(), ProgressDisplay(error_console(), quiet=messages.quiet))


def _records(command: SpeedrunCommand) -> list[RecordDefinition]:
    """The records of a race, all of one track. Raises UserError for unknown names and wrong files."""
    if command.record is None:
        return [newest_definition(command.track or "cpu-2")]
    names = [name.strip() for name in command.record.split(",")]
    if "" in names:
        raise UserError(f"record {command.record!r} has an empty name; write NAME or NAME,NAME")
    found = [read_definition(name) for name in names]
    for record in found:
        if [other.name for other in found].count(record.name) > 1:
            raise UserError(f"record {record.name} is named twice in {command.record!r}")
        track = command.track or found[0].track
        if record.track != track:
            raise UserError(
                f"record {record.name} is of track {record.track}, not {track}; race each track by itself"
            )
    return found


def _as_written(command: SpeedrunCommand, records: list[RecordDefinition]) -> str:
    """The command that repeats the race, without the paths of this machine."""
    names = [Path(name.strip()).name for name in (command.record or records[0].name).split(",")]
    words = ["fastdynat", "speedrun", "--record", ",".join(names)]
    words += [] if command.target is None else ["--target", f"{command.target:g}"]
    words += ["--seeds", str(command.seeds), "--data", command.data]
    return shlex.join([*words, "--data-dir", Path(command.data_dir).name or "."])
